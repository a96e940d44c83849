"""Prompts to sample on and texts to score, encoded as training has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from halos_pl.data.dataset import FeedbackDataset
from halos_pl.data.prepare import Preparation
from halos_pl.data.records import BadRows, DataError, OnBadRow, Origin, Text, parse_prompt
from halos_pl.data.sources import as_sources, read_rows
from halos_pl.data.store import Corpus
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.truncation import Tokens
from halos_pl.data.views import as_demonstrations


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt, its token ids, and the row that it stood in, for the verifier, with its place."""

    text: Text
    tokens: Tokens
    row: Mapping[str, Any]
    origin: Origin

    @property
    def last_turn(self) -> str:
        """What a reader sees of it: the text, or the last message."""
        return self.text if isinstance(self.text, str) else str(self.text[-1]["content"])


def load_prompts(
    source: str,
    encoder: CompletionTokenizer,
    *,
    split: str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> list[Prompt]:
    """The prompts of a source, in its order.

    Args:
        source: as `read_rows` takes it. Rows need a `prompt` (or `messages`, or `chosen` with a shared beginning);
            what else stands in them is the verifier's.
        encoder: of the run.
        split: as `read_rows` takes it.
        limit: take the first ones only.
        on_bad_row: stop at rows without a prompt, or go on without them.

    Raises:
        DataError: no such source, or rows without a prompt, the first ten listed.
    """
    bad = BadRows(on_bad_row)
    found: list[Prompt] = []
    for origin, row in read_rows(source, split):
        if limit is not None and len(found) >= limit:
            break
        with bad.caught():
            if isinstance(row, DataError):
                raise row
            text, tools = parse_prompt(row, origin)
            assert isinstance(row, Mapping)
            found.append(Prompt(text, encoder.encode_prompt(text, origin=origin, tools=tools), row, origin))
    bad.finish()
    if not found:
        raise DataError(f"{source}: no prompts")
    return found


def load_text(source: str, prepare: Preparation, *, limit: int | None = None) -> list[tuple[Tokens, Tokens]]:
    """(prompt, completion) tokens of the demonstrations of a source, as SFT reads them.

    Raises:
        DataError: no such source, malformed rows, or nothing to imitate.
    """
    prepare = replace(prepare, turns="last", known={})  # whatever the training's are
    corpus = Corpus([path for one in as_sources(source, None) for path in prepare(one).blocks])
    good = as_demonstrations(corpus, np.arange(len(corpus)))
    if not len(good):
        raise DataError(f"{source}: all completions are labelled undesirable: no text to score")
    dataset = FeedbackDataset(corpus, good.take(np.arange(len(good))[:limit]), prepare.encoder)
    return [(example.prompt, example.completion) for (example,), _ in dataset]
