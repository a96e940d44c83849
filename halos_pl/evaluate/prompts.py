"""Prompts to sample on and texts to score, encoded as training has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halos_pl.data.records import BadRows, DataError, OnBadRow, Origin, Text, parse_prompt
from halos_pl.data.sources import load_records, read_rows
from halos_pl.data.tokenization import CompletionTokenizer, Tokens
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


def load_text(
    source: str, encoder: CompletionTokenizer, *, limit: int | None = None, on_bad_row: OnBadRow = "error"
) -> list[tuple[Tokens, Tokens]]:
    """(prompt, completion) tokens of the demonstrations of a source, as SFT reads them.

    Raises:
        DataError: no such source, malformed rows, or nothing to imitate.
    """
    records = as_demonstrations(load_records(source, on_bad_row=on_bad_row).records)[:limit]
    if not records:
        raise DataError(f"{source}: all completions are labelled undesirable: no text to score")
    examples = encoder.examples(records, on_bad_row=on_bad_row).examples
    return [(x.prompt, x.completion) for x in examples if x is not None]  # None: skipped as a bad row
