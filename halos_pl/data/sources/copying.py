"""Rows as they stand in their source: to count them, and to copy some of them out."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from halos_pl.data.records import DataError
from halos_pl.data.sources import files, formats, hub
from halos_pl.data.sources.archives import BLOCK, UNREADABLE, opened
from halos_pl.data.sources.hub import Place
from halos_pl.data.sources.reading import resolve
from halos_pl.data.sources.source import Source
from halos_pl.data.sources.tables import records
from halos_pl.nano.shipped import generated


def copy_rows(source: Source, wanted: Collection[tuple[str, int]], out: BinaryIO) -> set[tuple[str, int]]:
    """Write rows of a source, in its order, and return those that were found.

    A line of JSONL, and a record of CSV or TSV, is written bit for bit with its line ending (a last line that has none
    gets one); a row of anything else becomes a line of JSON.

    Args:
        source: of the rows.
        wanted: (file, row) as the rows' origins have them; rows of other sources are passed over.
        out: a binary file.

    Raises:
        DataError: as `read_rows`.
    """
    rows, found = frozenset(wanted), set[tuple[str, int]]()
    for file, number, content in _contents(source, {file for file, _ in rows}):
        if (file, number) in rows:
            out.write(content if content.endswith(b"\n") else content + b"\n")
            found.add((file, number))
    return found


def count_rows(source: Source) -> int | None:
    """How many rows a source has at most, without parsing them; None where only reading tells."""
    place = resolve(source)
    if isinstance(place, Path):
        counts = [_count(file) for file in files.members(place)]
        return None if None in counts else sum(x for x in counts if x is not None)
    return hub.count(place) if isinstance(place, Place) else None


def _contents(source: Source, wanted: set[str]) -> Iterator[tuple[str, int, bytes]]:
    place = resolve(source)
    if isinstance(place, Path):
        for file in files.members(place):
            if str(file) in wanted:
                yield from _contents_of(file)
    elif isinstance(place, Place) and str(place) in wanted:
        for origin, row in hub.read(place):
            yield origin.file, origin.row, _line(row)
    elif isinstance(place, str) and place in wanted:
        for number, row in enumerate(generated(place) or (), 1):
            yield place, number, _line(row)


def _contents_of(file: Path) -> Iterator[tuple[str, int, bytes]]:
    name, kind = str(file), formats.extension(file)
    if kind in formats.SEPARATORS:
        for record in records(file, formats.SEPARATORS[kind]):
            yield name, record.line, record.content
    elif kind == ".jsonl" or (kind == ".json" and formats.is_lines(file)):
        for number, line in formats.lines(file):
            yield name, number, b"" if isinstance(line, DataError) else line
    else:
        for origin, row in formats.read_file(file):
            yield name, origin.row, _line(row)


def _line(row: object) -> bytes:
    return json.dumps(row, default=str).encode() + b"\n"


def _count(file: Path) -> int | None:
    kind = formats.extension(file)
    if kind == ".parquet":
        return formats.count_parquet(file)
    if kind == ".json":
        return None
    count, block = 0, b""
    try:
        with opened(file) as stream:
            while more := stream.read(BLOCK):
                block = more
                count += block.count(b"\n")
    except UNREADABLE as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return count + (not block.endswith(b"\n"))
