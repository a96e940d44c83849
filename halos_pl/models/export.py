"""The policy as a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_policy(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    *,
    adopt_ids: bool = False,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write weights (safetensors), tokenizer with its chat template, generation settings and model card.

    The folder appears whole or not at all: everything is written beside it, then renamed.

    Args:
        lm: the policy.
        tokenizer: as the data used it, its end-of-sequence token included.
        folder: target; an older export of the same run is replaced.
        card: text of README.md.
        adopt_ids: take all special token ids from the tokenizer: for a bare configuration, whose defaults belong to
            some other tokenizer.
        weights: by name, whole, where those of the model are sharded.
    """
    generation = lm.generation_config
    if adopt_ids:
        for owner in (lm.config, generation):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(owner, name, getattr(tokenizer, name))
    elif generation is not None:
        known = generation.eos_token_id
        ends = [] if known is None else known if isinstance(known, list) else [known]
        if tokenizer.eos_token_id not in ends:
            generation.eos_token_id = [tokenizer.eos_token_id, *ends]
        if generation.pad_token_id is None:
            generation.pad_token_id = tokenizer.pad_token_id
    with appearing(folder) as aside:
        lm.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Another folder to write to, which takes the place of this one at the end, and is gone if anything goes wrong."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        _readable(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)


def _readable(folder: Path) -> None:
    """Give its files the mode that new files have here; safetensors makes its own for the owner alone."""
    mode = os.umask(0)
    os.umask(mode)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~mode)
