"""Rows of no named reader: our own schemas, transcripts as Anthropic's HH has them, and LLaMA-Factory's rows.

A file's first row that can be parsed decides for all of it. Lines in our own schemas pass unparsed.
"""

from __future__ import annotations

from collections.abc import Mapping

from halos_pl.data.messages import listed
from halos_pl.data.records import DataError
from halos_pl.data.sources.readers import hh, llama_factory
from halos_pl.data.sources.rows import Rows, head

OURS = ("prompt", "completion", "chosen", "rejected", "messages")  # and text, which OASST has too
NAMED = {
    "shp": ("human_ref_A", "human_ref_B"),
    "oasst": ("message_id", "role", "text"),
    "gsm8k": ("question", "answer"),
    "llama-factory": ("instruction", "output"),
}
"""Reader -> keys of rows that only it understands."""


def read(rows: Rows) -> Rows:
    """The rows of one file.

    Raises:
        DataError: they are of a kind whose reader must be named.
    """
    first, rows = head(rows)
    if not isinstance(first, Mapping):
        yield from rows
    elif _is_hh(first):
        yield from hh.read(rows)
    elif _is_llama_factory(first):
        yield from llama_factory.read(rows)
    elif (name := _named(first)) is not None:
        file = next(rows)[0].file
        raise DataError(
            f"{file}: its rows are of a kind that the reader {name!r} reads (their keys are: {listed(first)}); "
            f"expected it to be named, as in {{path: {file}, reader: {name}}}"
        )
    else:
        yield from rows


def _is_hh(row: Mapping[str, object]) -> bool:
    return "prompt" not in row and hh.is_transcript(row.get("chosen")) and hh.is_transcript(row.get("rejected"))


def _is_llama_factory(row: Mapping[str, object]) -> bool:
    ours = any(row.get(key) is not None for key in ("prompt", "completion", "messages"))
    return not ours and (row.get("kto_tag") is not None or row.get("conversations") is not None)


def _named(row: Mapping[str, object]) -> str | None:
    present = {key for key, value in row.items() if value is not None}
    if row.get("event") in ("feedback", "retraction") and "id" in present:
        return "events"
    if not present.isdisjoint(OURS):
        return None
    names = [name for name, keys in NAMED.items() if present.issuperset(keys)]
    return names[0] if names and (names[0] == "oasst" or "text" not in present) else None
