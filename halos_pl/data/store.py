"""Tokenized records on disk: Arrow files that are written once, whole, and read by mapping them into memory.

A file holds the records of one block of a source's rows, with all their tokens: nothing is cut and no control added, so
that lengths may change, and labels be permuted, without tokenizing again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from halos_pl.data.records import Origin, Paired, Record, Text
from halos_pl.data.tokenization import Encoded
from halos_pl.data.truncation import Tokens

KEY = 16  # bytes of a text's digest
SIDES = {"chosen": 0, "rejected": 1, None: -1}
_TOKENS = pa.large_list(pa.int32())
_SCHEMA = pa.schema(
    {
        "prompt": _TOKENS,
        "first": _TOKENS,  # the completion, or the chosen one
        "second": _TOKENS,  # the rejected one; empty where there is none
        "prompt_key": pa.binary(KEY),
        "opening_key": pa.binary(KEY),  # of the prompt up to the first user's turn
        "first_key": pa.binary(KEY),
        "second_key": pa.binary(KEY),
        "label": pa.int8(),  # 1, 0, or -1 for none
        "score": pa.float64(),  # NaN for none
        "demonstration": pa.int8(),  # 0 the first, 1 the second, -1 neither
        "file": pa.int32(),
        "row": pa.int64(),
    }
)
Bad = tuple[str, int, str]
"""File, row and message of a row that could not be used."""


class Notes(NamedTuple):
    """What is to be said of a block's rows."""

    bad: list[Bad]
    warnings: list[str]


def write_block(path: Path, rows: Sequence[tuple[Record, Encoded]], notes: Notes) -> None:
    """One file, whole or not at all: a process that is killed leaves no part of it under its name."""
    records = [record for record, _ in rows]
    encoded = [ids for _, ids in rows]
    files = list(dict.fromkeys(x.origin.file for x in records))
    place = {file: i for i, file in enumerate(files)}
    empty = bytes(KEY)
    columns = [
        _lists([x.prompt for x in encoded]),
        _lists([x.completions[0] for x in encoded]),
        _lists([x.completions[1] if len(x.completions) == 2 else [] for x in encoded]),
        [_key([x.prompt, x.tools]) for x in records],
        [_key(_opening(x.prompt)) for x in records],
        [_key(x.chosen if isinstance(x, Paired) else x.completion) for x in records],
        [_key(x.rejected) if isinstance(x, Paired) else empty for x in records],
        [-1 if isinstance(x, Paired) or x.desirable is None else int(x.desirable) for x in records],
        [np.nan if isinstance(x, Paired) or x.score is None else x.score for x in records],
        [SIDES[x.demonstration] if isinstance(x, Paired) else 0 for x in records],
        [place[x.origin.file] for x in records],
        [x.origin.row for x in records],
    ]
    arrays = [x if isinstance(x, pa.Array) else pa.array(x, y.type) for x, y in zip(columns, _SCHEMA, strict=True)]
    schema = _SCHEMA.with_metadata({"files": json.dumps(files), "notes": json.dumps(notes)})
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with temporary.open("wb") as out:
        with pa.ipc.new_file(out, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def notes_of(path: Path) -> Notes:
    """What was said of a block's rows when it was written.

    Raises:
        OSError: the file is not there, or damaged.
    """
    try:
        with pa.memory_map(str(path)) as source:
            bad, warnings = json.loads(pa.ipc.open_file(source).schema.metadata[b"notes"])
            return Notes([(file, row, message) for file, row, message in bad], warnings)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise OSError(f"{path}: damaged: {error}") from error


@dataclass(frozen=True)
class _Ragged:
    """Lists of token ids, one after the other."""

    starts: NDArray[np.int64]
    values: Tokens

    def __getitem__(self, index: int) -> Tokens:
        return self.values[self.starts[index] : self.starts[index + 1]]


class Corpus:
    """The tokenized records of some blocks, numbered through; tokens stay on disk until they are asked for.

    Attributes:
        counts: records of each path.
        sizes: tokens of "prompt", "first" and "second", int32 [records] each.
        paired: bool [records].
        label: int8 [records]: 1, 0 or -1 for none.
        score: float64 [records], NaN for none.
        demonstration: int8 [records]: which completion to imitate: 0 the first, 1 the second, -1 neither.
        file: int32 [records], index of `files`.
        row: int64 [records].
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = [Path(path) for path in paths]
        places: dict[str, int] = {}
        self._tokens: dict[str, list[_Ragged]] = {name: [] for name in ("prompt", "first", "second")}
        columns: dict[str, list[Any]] = {name: [] for name in ("label", "score", "demonstration", "file", "row")}
        keys: dict[str, list[Any]] = {name: [] for name in (*self._tokens, "opening")}
        counts = []
        for path in self.paths:
            schema, batch = _open(path)
            counts.append(batch.num_rows)
            for name, blocks in self._tokens.items():
                column = batch.column(name)
                blocks.append(_Ragged(column.offsets.to_numpy(), column.values.to_numpy()))
            for name, digests in keys.items():
                digests.append(_digests(batch.column(f"{name}_key")))
            for name in columns:
                columns[name].append(batch.column(name).to_numpy())
            names = [places.setdefault(name, len(places)) for name in json.loads(schema.metadata[b"files"])]
            columns["file"][-1] = np.array([*names, 0], np.int32)[columns["file"][-1]]
        self.files = list(places)
        self._starts = np.cumsum([0, *counts])
        self.counts = dict(zip(self.paths, counts, strict=True))
        self.sizes = {
            name: np.concatenate([np.empty(0, np.int32), *(np.diff(x.starts) for x in blocks)]).astype(np.int32)
            for name, blocks in self._tokens.items()
        }
        self.paired = self.sizes["second"] > 0
        self.label, self.score, self.demonstration, self.file, self.row = (
            np.concatenate([np.empty(0, _SCHEMA.field(name).type.to_pandas_dtype()), *parts])
            for name, parts in columns.items()
        )
        self._keys = keys

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.paths,)

    def origin(self, record: int) -> Origin:
        return Origin(self.files[self.file[record]], int(self.row[record]))

    def tokens(self, name: str, record: int) -> Tokens:
        """Ids of a record's "prompt", "first" or "second" completion, all of them."""
        block = int(np.searchsorted(self._starts, record, side="right")) - 1
        return self._tokens[name][block][record - int(self._starts[block])]

    def keys(self, name: str) -> NDArray[np.uint8]:
        """Digests of the raw texts, uint8 [records, 16]: equal ones mean equal texts, whatever is cut off later.
        "opening" is the prompt up to its first user's turn: all turns of a conversation share it."""
        return np.concatenate([np.empty((0, KEY), np.uint8), *self._keys[name]])


def codes(keys: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Numbers for digests, uint8 [n, 16], in the order of their first appearance."""
    flat = pa.py_buffer(np.ascontiguousarray(keys))
    array = pa.Array.from_buffers(pa.binary(KEY), len(keys), [None, flat])
    return np.asarray(array.dictionary_encode().indices.to_numpy(), np.int64)


def _opening(prompt: Text) -> Text:
    if isinstance(prompt, str):
        return prompt
    asked = next((i for i, message in enumerate(prompt) if message["role"] == "user"), len(prompt))
    return prompt[: asked + 1]


_canonical = json.JSONEncoder(sort_keys=True, default=str).encode


def _key(value: object) -> bytes:
    return blake2b(_canonical(value).encode(), digest_size=KEY).digest()


def _lists(rows: Sequence[Sequence[int]]) -> pa.Array:
    sizes = np.fromiter(map(len, rows), np.int64, len(rows))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    values = np.fromiter(chain.from_iterable(rows), np.int32, int(starts[-1]))
    return pa.LargeListArray.from_arrays(pa.array(starts, pa.int64()), pa.array(values, pa.int32()))


def _open(path: Path) -> tuple[Any, Any]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return reader.schema, reader.get_batch(0)


def _digests(column: Any) -> NDArray[np.uint8]:
    if not len(column):
        return np.empty((0, KEY), np.uint8)
    data = np.frombuffer(column.buffers()[1], np.uint8)
    return data[: len(column) * KEY].reshape(-1, KEY)
