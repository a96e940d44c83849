"""A source of rows, as a user asks for it."""

from __future__ import annotations

import re
import reprlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from halos_pl.data.records import nearest
from halos_pl.data.sources.readers import READERS, Recipe
from halos_pl.nano.shipped import SCHEME

KEYS = ("prompt", "completion", "chosen", "rejected", "messages", "text", "label", "score", "tools", "split")
MAX_WEIGHT = 1_000_000_000
LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Source:
    """One source of rows.

    Args:
        path: a JSON, JSONL, CSV, TSV or Parquet file (all but the last also as .gz, .zst, .bz2 or .xz), a folder of
            these, a hub dataset (owner/name, or owner/name@revision), or a `nano:` name of what ships; null: the hub
            dataset that the reader is made for.
        reader: how its rows are read: auto (prompt+completion, chosen+rejected, messages or text, transcripts of
            Anthropic's HH, LLaMA-Factory's rows), or hh, hh:helpful, hh:harmless, shp, oasst, ultrafeedback,
            ultrachat, kto-mix, gsm8k, llama-factory, events.
        split: rows of this split only: by the rows' `split` field, else by the files' names; the hub's split (null:
            train).
        limit: this many of its rows, drawn by the seed (of a streamed dataset, the first).
        weight: how often each row comes in an epoch: 0.5 for half of the rows, drawn by the seed; 2 for each twice.
        threshold: makes labels of scores. One number: a score above it is desirable, any other undesirable. Two, as
            [low, high]: up to low is undesirable, from high on desirable, and what lies between is left out.
        columns: our key -> the file's column, as in {prompt: question, completion: answer, label: thumbs}.
        streaming: iterate over a hub dataset without downloading the whole.

    Raises:
        ValueError: for values that mean nothing.
    """

    path: str | None = None
    reader: str = "auto"
    split: str | None = None
    limit: int | None = None
    weight: float = 1.0
    threshold: float | list[float] | None = None
    columns: dict[str, str] | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if self.reader not in READERS:
            raise ValueError(f"reader: {self.reader!r}{nearest(self.reader, READERS)}; expected {', '.join(READERS)}")
        if self.path is None and self.recipe.hub is None:
            raise ValueError(f"path: null, but the reader {self.reader!r} has no hub dataset of its own; expected one")
        whole = isinstance(self.limit, int) and not isinstance(self.limit, bool)
        if self.limit is not None and not (whole and self.limit >= 1):
            raise ValueError(f"limit: {self.limit!r}; expected at least 1 row, or null for all")
        if not 0 < self.weight <= MAX_WEIGHT:
            raise ValueError(f"weight: {reprlib.repr(self.weight)}; expected a number above 0, up to {MAX_WEIGHT:,}")
        if self.streaming and (self.is_shipped or self.is_local):
            raise ValueError(f"streaming: true, but {self.path} is no hub dataset; local rows are never loaded whole")
        _ = self.bounds
        self._check_columns()

    def __hash__(self) -> int:
        return hash(repr(self))

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """What a reader of a report knows it by: its path, else its reader."""
        return self.path if self.path is not None else self.reader

    @property
    def recipe(self) -> Recipe:
        return READERS[self.reader]

    @property
    def is_shipped(self) -> bool:
        return self.path is not None and self.path.startswith(SCHEME)

    @property
    def is_local(self) -> bool:
        return self.path is not None and exists(self.path)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """(undesirable up to, desirable from or, of one threshold, above)."""
        if self.threshold is None:
            return None
        given = self.threshold if isinstance(self.threshold, list | tuple) else [self.threshold]
        numbers = [x for x in given if isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= LARGEST]
        if len(numbers) != len(given) or len(given) not in (1, 2):
            raise ValueError(f"threshold: {reprlib.repr(self.threshold)}; expected a number, or two as [low, high]")
        low, high = float(numbers[0]), float(numbers[-1])
        if len(numbers) == 2 and not low < high:
            raise ValueError(f"threshold: {reprlib.repr(self.threshold)}; expected low < high (or one number)")
        return low, high

    def _check_columns(self) -> None:
        for key, column in (self.columns or {}).items():
            if not (isinstance(column, str) and column):
                raise ValueError(f"columns: {key}: {column!r}; expected the name of a column")
            if self.reader == "auto" and key not in KEYS and (hint := nearest(key, KEYS, cutoff=0.8)):
                raise ValueError(f"columns: {key!r} is no key of ours{hint}; expected {', '.join(KEYS)}")


def as_sources(spec: str | Source | list[str | Source] | None, split: str | None = None) -> list[Source]:
    """Sources of what a user gives: a name, a Source, a list of these, or nothing.

    A name is a path, unless nothing is there and a reader is called so: then it is this reader with its hub dataset.

    Args:
        spec: as `data.train` takes it.
        split: of the sources that name none.
    """
    given = [] if spec is None else spec if isinstance(spec, list) else [spec]
    sources = [_named(x) if isinstance(x, str) else x for x in given]
    return [x if split is None or x.split is not None else replace(x, split=split) for x in sources]


def exists(path: str) -> bool:
    """Whether a file or folder of this name is there; False for what no file can be called."""
    try:
        return path != "" and Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _named(name: str) -> Source:
    if name.lstrip().startswith("{"):  # what the command line could not take for a Source
        found = re.findall(r"[{,]\s*[\"']?(\w+)[\"']?\s*:", name)
        wrong = next((x for x in found if x not in Source.__dataclass_fields__), None)
        near = nearest(wrong, Source.__dataclass_fields__) if wrong else ""
        keys = ", ".join(Source.__dataclass_fields__)
        raise ValueError(
            f"{name!r}: {repr(wrong) + ' is' if wrong else 'it has'} no key of a source{near}; expected {keys}"
        )
    if name in READERS and READERS[name].hub is not None and not exists(name):
        return Source(reader=name)
    return Source(path=name)
