"""Local files: JSON, JSONL, Parquet, and folders of these."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from halos_pl.data.records import DataError, DataWarning, Origin

SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")


def read(path: Path, split: str | None = None) -> Iterator[tuple[Origin, object]]:
    """Rows of a file, or of a folder's files in the order of their names; a DataError stands for an unreadable row.

    A row's split is its `split` field, else the word of its file's or folder's name that is a split (`train.jsonl`).

    Raises:
        DataError: a file that cannot be read or has no rows, a folder without data, a split that no row has.
    """
    seen: dict[str, None] = {}
    found = False
    for file in _members(path):
        named = _split_in(file.stem, split) or (_split_in(path.name, split) if path.is_dir() else None)
        for origin, row in _rows(file):
            own = row.get("split") if isinstance(row, dict) else None
            if (name := named if own is None else str(own)) is not None:
                seen[name] = None
            if split in (None, name) or (isinstance(row, DataError) and name is None):
                found = True
                yield origin, row
    values = ", ".join(map(repr, seen)) or "none (no row has a `split` field)"
    if not found:
        raise DataError(f"{path}: no row of split {split!r}; the splits there are: {values}")
    if split is None and len(seen) > 1:
        warnings.warn(f"{path}: rows of all splits are used together ({values})", DataWarning, stacklevel=2)


def _members(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    names = sorted(x for x in path.iterdir() if not x.name.startswith("."))
    if data := [x for x in names if x.suffix in READERS and x.is_file()]:
        return data
    has = ", ".join(x.name for x in names[:10]) or "nothing"
    raise DataError(f"{path}: no data in this folder, it has: {has}; expected {', '.join(READERS)}")


def _split_in(name: str, split: str | None) -> str | None:
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((x for x in (split, *SPLITS) if x in words), None)


def _rows(file: Path) -> Iterator[tuple[Origin, object]]:
    if file.suffix not in READERS:
        raise DataError(f"{file}: unknown kind of file {file.suffix!r}; expected {', '.join(READERS)}")
    origin = None
    try:
        for number, row in READERS[file.suffix](file):
            origin = Origin(str(file), number)
            yield origin, row
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if origin is None:
        raise DataError(f"{file}: no rows in this file")


def _jsonl(file: Path) -> Iterator[tuple[int, object]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if text := line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
                yield number, _parsed(text, f"{file}:{number}")


def _parsed(text: bytes, where: str) -> Any | DataError:
    expected = "expected one JSON object a line"
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        return DataError(f"{where}: byte {error.start + 1}: not UTF-8 ({error.reason}); {expected}")
    except json.JSONDecodeError as error:
        return DataError(f"{where}: column {error.colno}: {error.msg}; {expected}")
    except (ValueError, RecursionError) as error:  # a number of too many digits, too deep a nesting
        return DataError(f"{where}: {error}; {expected}")


def _json(file: Path) -> Iterator[tuple[int, object]]:
    try:
        rows = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}; with one object a line, name the file .jsonl") from error
    if not isinstance(rows, list):
        raise DataError(f"{file}: the top level is a {type(rows).__name__}; expected an array of objects")
    yield from enumerate(rows, 1)


def _parquet(file: Path) -> Iterator[tuple[int, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches())
            yield from enumerate((row for batch in batches for row in batch), 1)
    except pa.ArrowException as error:
        raise DataError(f"{file}: not Parquet: {str(error).splitlines()[0]}") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[int, object]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
