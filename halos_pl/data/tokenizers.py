"""Tokenizers: loading one, and the two forms of it that texts need at their start and after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from halos_pl.nano.shipped import locate


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a hub name or a `nano:` name.

    Raises:
        ValueError: where there is none.
    """
    try:
        folder = Path(locate(name)).expanduser()
        tokenizer = AutoTokenizer.from_pretrained(
            folder if folder.is_dir() else name, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be loaded from {name!r}: {error}") from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # made up from a bare config.json
        raise ValueError(f"no tokenizer in {name!r}: it has no tokenizer.json")
    return tokenizer


def opening_and_continuation(backend: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
    """Private copies of the tokenizer, without truncation and padding: for the start of a text, and for what follows.

    The second one lacks the dummy space that SentencePiece-like tokenizers put before a text; without such a space it
    is the first one.
    """
    opening = Tokenizer.from_str(backend.to_str())
    opening.no_truncation()
    opening.no_padding()
    description = json.loads(opening.to_str())
    changed = description | {x: _without_prefix_space(description[x]) for x in ("normalizer", "pre_tokenizer")}
    return opening, opening if changed == description else Tokenizer.from_str(json.dumps(changed))


def _without_prefix_space(part: Any) -> Any:
    match part:
        case {"type": "Sequence"}:
            key = next(x for x in part if x != "type")
            return part | {key: [kept for x in part[key] if (kept := _without_prefix_space(x)) is not None]}
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return part | {"prepend_scheme": "never"}
        case {"type": "ByteLevel"} if "add_prefix_space" in part:
            return part | {"add_prefix_space": False}
    return part
