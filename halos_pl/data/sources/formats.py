"""Formats of local files: JSONL, JSON, CSV, TSV and Parquet; all but the last also compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

from halos_pl.data.messages import brief
from halos_pl.data.records import DataError, Origin
from halos_pl.data.sources.archives import COMPRESSIONS, UNREADABLE, opened
from halos_pl.data.sources.rows import Rows, loads, parsed

MAX_LINE = 64 * 2**20  # bytes
MAX_ARRAY = 2 * 2**30  # bytes of a JSON array, which is held in memory whole
BOM = b"\xef\xbb\xbf"

Numbered = Iterator[tuple[int, object]]


def extension(file: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`, in lower case; "" where it is no format that is read."""
    suffixes = [x.lower() for x in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        packed = suffixes[-2] if len(suffixes) == 2 else ""
        return packed if packed in FORMATS and packed != ".parquet" else ""
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else ""


def read_file(file: Path) -> Rows:
    """Rows of one file, with the number of the row, or of the line where it starts, counted from 1.

    JSON lines come as bytes, unparsed.

    Raises:
        DataError: a file that cannot be read, is damaged or has no rows.
    """
    if not (kind := extension(file)):
        raise DataError(f"{file}: unknown kind of file {''.join(file.suffixes[-2:])!r}; expected {EXPECTED}")
    name, number = str(file), 0
    try:
        for number, row in FORMATS[kind](file):
            yield Origin(name, number), row
    except UNREADABLE as error:
        after = f" after row {number}" if number else ""
        raise DataError(f"{file}: cannot be read{after}: {error}") from error
    if not number:
        raise DataError(f"{file}: no rows in this file")


def lines(file: Path) -> Iterator[tuple[int, bytes | DataError]]:
    """Lines with their endings, numbered from 1; a DataError stands for one that is too long."""
    with opened(file) as stream:
        for number, line in enumerate(iter(partial(stream.readline, MAX_LINE + 1), b""), 1):
            if len(line) <= MAX_LINE:
                yield number, line
            else:
                _skip(line, stream)
                yield number, too_long(Origin(str(file), number))


def too_long(origin: Origin) -> DataError:
    return DataError(f"{origin}: a line of more than {MAX_LINE >> 20} MiB; expected one row", origin=origin)


def _skip(line: bytes, stream: BufferedReader[Any]) -> None:
    while line and not line.endswith(b"\n"):
        line = stream.readline(MAX_LINE)


def is_lines(file: Path) -> bool:
    """Whether a file named .json has one object a line, as some hub datasets have it, and no array."""
    with opened(file) as stream:
        first = stream.readline(MAX_LINE).removeprefix(BOM).lstrip()
        while first == b"" and stream.peek(1):
            first = stream.readline(MAX_LINE).lstrip()
        second = stream.readline(MAX_LINE).strip()
    return first.startswith(b"{") and second != b"" and isinstance(parsed(first, Origin(str(file), 1)), dict)


def _jsonl(file: Path) -> Numbered:
    for number, line in lines(file):
        if isinstance(line, DataError):
            yield number, line
            continue
        if number == 1:
            line = line.removeprefix(BOM)
        if line and not line.isspace():
            yield number, line


def _json(file: Path) -> Numbered:
    if is_lines(file):
        yield from _jsonl(file)
        return
    with opened(file) as stream:
        content = stream.read(MAX_ARRAY + 1)
    if len(content) > MAX_ARRAY:
        raise DataError(f"{file}: an array of more than {MAX_ARRAY >> 20} MiB; expected one object a line, as .jsonl")
    if not content.removeprefix(BOM).strip():
        return
    try:
        rows = loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}; with one object a line, name the file .jsonl") from error
    if not isinstance(rows, list):
        raise DataError(f"{file}: the top level is a {type(rows).__name__}; expected an array of objects")
    yield from enumerate(rows, 1)


def _parquet(file: Path) -> Numbered:
    with _table(file) as table:
        batches = (batch.to_pylist() for batch in table.iter_batches())
        yield from enumerate((row for batch in batches for row in batch), 1)


def count_parquet(file: Path) -> int:
    with _table(file) as table:
        return int(table.metadata.num_rows)


@contextmanager
def _table(file: Path) -> Iterator[Any]:
    """An open Parquet file.

    Raises:
        DataError: it cannot be read; also for what its consumer finds: text that is not UTF-8, values that Python has
            not (a date after the year 9999).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with opened(file):  # a regular file that can be read, or the reason why not
            pass
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    try:
        with pq.ParquetFile(file) as table:
            yield table
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        zone = "zoneinfo" in str(error)  # Arrow asks to install what is there
        why = "a time zone that is not known here" if zone else brief(" ".join(str(error).split()))
        raise DataError(f"{file}: not Parquet that can be read: {why}") from error


def _separated(file: Path) -> Numbered:
    from halos_pl.data.sources.tables import read_table

    return read_table(file, SEPARATORS[extension(file)])


FORMATS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _separated,
    ".tsv": _separated,
}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
EXPECTED = f"{', '.join(FORMATS)}, and all but Parquet also with {', '.join(COMPRESSIONS)}"
