"""Local files and folders, and the splits of their rows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from halos_pl.data.messages import listed
from halos_pl.data.records import DataError, DataWarning
from halos_pl.data.sources.formats import EXPECTED, extension, read_file
from halos_pl.data.sources.rows import Rows, head, parsed

SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")


def read(path: Path, split: str | None = None, *, alias: str | None = None, key: str = "split") -> Iterator[Rows]:
    """Rows of a file, or of a folder's files in the order of their names, file by file.

    A row's split is its `split` field, else the word of its file's or folder's name that is a split (`train.jsonl`).
    The first row of a file says whether its rows have the field. JSON lines come as bytes where they need not be looked
    into.

    Args:
        path: a file or a folder.
        split: the rows to take; default: all.
        alias: another name that files may have for this split.
        key: the field that names a row's split.

    Raises:
        DataError: a file that cannot be read or has no rows, a folder without data, a split that no row has.
    """
    files = members(path)
    sought = alias if alias and any(_has(x.name, alias) for x in files) else split
    splits = _Splits(split, key)
    for file in files:
        named = _split_in(file, path, sought)
        if named != sought and named == split:  # train_sft, where train means train_prefs
            named = file.name
        yield splits.of(file, split if named == sought else named)
    splits.finish(path)


def members(path: Path) -> list[Path]:
    """The files that a path stands for, in the order in which they are read."""
    try:
        return _data(path) if path.is_dir() else [path]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _data(path: Path) -> list[Path]:
    names = sorted(x for x in path.iterdir() if not x.name.startswith("."))
    if not (data := [x for x in names if extension(x)]):
        has = f"it has: {listed(x.name for x in names)}" if names else "it is empty"
        raise DataError(f"{path}: no data in this folder, {has}; expected {EXPECTED}")
    for file in data:
        if not file.is_file():
            what = "a folder" if file.is_dir() else "no regular file" if file.exists() else "a link to nothing"
            raise DataError(f"{file}: {what}; expected a file, as its name has {extension(file)}")
    return data


def split_of(path: Path) -> str | None:
    """The split that all of a path's files are named after; None where they differ or have none."""
    named = {_split_in(x, path, None) for x in members(path)}
    return named.pop() if len(named) == 1 else None


class _Splits:
    """Takes the rows of one split, and knows at the end which there were."""

    def __init__(self, split: str | None, key: str) -> None:
        self.split, self.key = split, key
        self.seen: dict[str, None] = {}
        self.found = False
        self._field = re.compile(rb'"%s"\s*:\s*"([^"\\]*)"' % re.escape(key.encode()))

    def of(self, file: Path, named: str | None) -> Rows:
        if named is not None:
            self.seen[named] = None
        first, rows = head(read_file(file))
        own = isinstance(first, dict) and first.get(self.key) is not None
        if not own and (self.split is None or named is not None):
            if self.split in (None, named):
                self.found = True
                yield from rows
        elif self.split is None:
            yield from self._all(rows)
        else:
            yield from self._one(rows, named)

    def _all(self, rows: Rows) -> Rows:
        """Every row; what their fields say is only gathered for the warning."""
        self.found = True
        for origin, row in rows:
            if isinstance(row, bytes):
                if match := self._field.search(row):
                    self.seen[match[1].decode(errors="replace")] = None
            elif isinstance(row, dict) and (value := row.get(self.key)) is not None:
                self.seen[str(value)] = None
            yield origin, row

    def _one(self, rows: Rows, named: str | None) -> Rows:
        for origin, row in rows:
            row = parsed(row, origin)
            value = row.get(self.key) if isinstance(row, dict) else None
            if (name := named if value is None else str(value)) is not None:
                self.seen[name] = None
            if name == self.split or (isinstance(row, DataError) and name is None):
                self.found = True
                yield origin, row

    def finish(self, path: Path) -> None:
        values = listed(map(repr, self.seen)) if self.seen else f"none (no row has a `{self.key}` field)"
        if not self.found:
            raise DataError(f"{path}: no row of split {self.split!r}; the splits there are: {values}")
        if self.split is None and len(self.seen) > 1:
            warnings.warn(f"{path}: rows of all splits are used together ({values})", DataWarning, stacklevel=2)


def _has(name: str, split: str) -> bool:
    """Whether a name has all words of a split's, in their order."""
    return f" {_words(split)} " in f" {_words(name)} "


def _words(name: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


def _split_in(file: Path, path: Path, split: str | None) -> str | None:
    """The split in a file's name, else in its folder's where a folder is read."""
    stem = file.name.lower().split(".")[0] if file.name[0] != "." else file.name
    for name in (stem, path.name) if path.is_dir() else (stem,):
        if found := next((x for x in (split, *SPLITS) if x and _has(name, x)), None):
            return found
    return None
