"""CSV and TSV: records with a header, whose cells may span lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from halos_pl.data.messages import brief, listed
from halos_pl.data.records import DataError, Origin
from halos_pl.data.sources import formats
from halos_pl.data.sources.columns import number
from halos_pl.data.sources.rows import loads

LONGEST_NAME = 64  # characters of a column's name: what is longer is data


class Cells(dict[str, object]):
    """A row of a table: its empty cells are absent, its `header` has them all."""

    header: Sequence[str] = ()


class Raw(NamedTuple):
    """One record: the line where it starts, its bytes with line endings, and its fields."""

    line: int
    content: bytes
    fields: list[str] | DataError


def read_table(file: Path, separator: str) -> Iterator[tuple[int, object]]:
    """Rows of a table, numbered by the line where they start.

    Cells are texts. An empty one is absent, but an empty `completion` stays (and is refused as such); `score` becomes
    a number; where the first row's cell is a JSON array of messages, its whole column is parsed as such.

    Raises:
        DataError: no header, or one with names that are empty, too long or the same.
    """
    rows = records(file, separator)
    header: list[str] | None = None
    structured: set[str] | None = None
    for line, _, fields in rows:
        if isinstance(fields, DataError):
            if header is None:
                raise fields
            yield line, fields
        elif header is None:
            header = _header(fields, file, separator)
        elif len(fields) != len(header):
            wrong = f"{len(fields)} fields; expected {len(header)}: {listed(header)}"
            yield line, DataError(f"{file}:{line}: {wrong}")
        else:
            if structured is None:
                structured = {key for key, cell in zip(header, fields, strict=True) if _messages(cell)}
            yield line, _row(header, fields, structured, f"{file}:{line}")


def records(file: Path, separator: str) -> Iterator[Raw]:
    """Every record that is not blank, the header first."""
    csv.field_size_limit(max(csv.field_size_limit(), formats.MAX_LINE))
    source = _Lines(file)
    reader = csv.reader(source, delimiter=separator, strict=True)
    while True:
        start = source.begin()
        fields: list[str] | DataError
        try:
            fields = next(reader)
        except StopIteration:
            return
        except DataError as error:
            fields = error
        except csv.Error as error:
            fields = DataError(f"{file}:{start}: {_reason(error)}; expected a record of fields in CSV's quoting")
        content = b"".join(source.taken)
        if isinstance(fields, DataError) or (fields and content.strip()):
            yield Raw(start, content, fields)


class _Lines(Iterator[str]):
    """Decoded lines for the csv module; `taken` has the bytes of those since `begin`, as of one record."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.number = self.start = 0
        self.taken: list[bytes] = []
        self._lines = formats.lines(file)

    def begin(self) -> int:
        """Begin a record: where it starts."""
        self.taken.clear()
        self.start = self.number + 1
        return self.start

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if isinstance(line, DataError):
            raise formats.too_long(Origin(str(self.file), self.start))
        self.taken.append(line)
        try:
            text = line.removeprefix(formats.BOM if self.number == 1 else b"").decode()
        except UnicodeDecodeError as error:
            byte = sum(map(len, self.taken[:-1])) + error.start + 1
            wrong = f"byte {byte}: not UTF-8 ({error.reason}); expected a record of fields"
            raise DataError(f"{self.file}:{self.start}: {wrong}") from error
        return text


def _reason(error: csv.Error) -> str:
    if "new-line character" in str(error):
        return "a carriage return outside of quotes"
    if "unexpected end of data" in str(error):
        return "a quote that is never closed"
    return brief(str(error))


def _header(fields: list[str], file: Path, separator: str) -> list[str]:
    names = [x.strip() for x in fields]
    expected = "the first line to name the columns, such as prompt, completion, label"
    if len(names) == 1 and (other := next((x for x in ",;\t|" if x != separator and x in names[0]), None)):
        raise DataError(f"{file}:1: one column, {names[0][:80]!r}, separated by {other!r}? expected {separator!r}")
    if any(not x or len(x) > LONGEST_NAME or "\n" in x for x in names):
        raise DataError(f"{file}:1: no header: {listed(names)}; expected {expected}")
    if twice := next((x for i, x in enumerate(names) if x in names[:i]), None):
        raise DataError(f"{file}:1: two columns are named {twice!r}; expected {expected}")
    return names


def _messages(cell: str) -> bool:
    if not cell.lstrip().startswith("["):
        return False
    try:
        value = loads(cell)
    except (ValueError, RecursionError):
        return False
    return bool(value) and all(isinstance(x, dict) and ("role" in x or "from" in x) for x in value)


def _row(header: list[str], fields: list[str], structured: set[str], where: str) -> Cells | DataError:
    row = Cells((key, cell) for key, cell in zip(header, fields, strict=True) if cell or key == "completion")
    row.header = header
    for key in structured & row.keys():
        try:
            row[key] = loads(str(row[key]))
        except (ValueError, RecursionError) as error:
            wrong = f"not JSON: {error if isinstance(error, json.JSONDecodeError) else 'refused, ' + str(error)}"
            return DataError(f"{where}: {key}: {wrong}; expected messages, as this column's first row has them")
    if "score" in row:
        row["score"] = number(str(row["score"]))
    return row
