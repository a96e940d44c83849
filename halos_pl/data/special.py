"""Control tokens inside a text: what would end a turn, or begin one, in the middle of what somebody wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from halos_pl.data.records import Message

_MARKER = re.compile(r"<\|[^|<>\s]{1,40}\|>|\[/?[A-Z_]{2,30}\]|<</?[A-Z]{2,30}>>")
_PROBES = [
    [{"role": role, "content": content} for role, content in turns]
    for turns in (
        [("system", "\ue000"), ("user", "\ue001"), ("assistant", "\ue002"), ("user", "\ue003")],
        [("user", "\ue001"), ("assistant", "\ue002"), ("user", "\ue003")],
        [("user", "\ue001")],
    )
]


class ControlTokens:
    """The texts that a row must not contain: the tokenizer's special tokens, what the chat template writes between
    turns in the form `<|name|>`, `[NAME]` or `<<NAME>>`, and the control texts of an objective.

    A text with one of them would end a turn, or begin another one in another's name, once it is tokenized.

    Args:
        tokenizer: with its chat template set.
        texts: further ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str] = ()) -> None:
        added = tokenizer.added_tokens_decoder.values()
        found = {*tokenizer.all_special_tokens, *(str(x) for x in added if x.special), *texts, *_markers(tokenizer)}
        self.texts = tuple(sorted((x for x in found if x.strip()), key=lambda x: (-len(x), x)))
        self._pattern = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")

    def find(self, text: str) -> re.Match[str] | None:
        """The first one in a text."""
        return self._pattern.search(text)


def _markers(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    if not tokenizer.chat_template:
        return set()
    found: set[str] = set()
    for messages in _PROBES:
        try:
            found |= set(_MARKER.findall(_rendered(tokenizer, messages)))
        except Exception:
            continue
    return found


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
