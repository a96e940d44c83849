"""What the readers share: row by row, values that are what their keys promise, and the turns of a conversation."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from halos_pl.data.messages import brief, listed
from halos_pl.data.records import DataError, Origin, nearest
from halos_pl.data.sources.rows import Rows, parsed

Row = Mapping[str, Any]
_SPACES = re.compile(r"[ \t]{2,}")


def each(convert: Callable[[Row, Origin], object]) -> Callable[[Rows], Rows]:
    """A reader that makes one row of each; a DataError that `convert` raises stands in the row's place."""

    def read(rows: Rows) -> Rows:
        for origin, line in rows:
            try:
                yield origin, convert(mapping(line, origin), origin)
            except DataError as error:
                yield origin, error

    return read


def mapping(line: object, origin: Origin) -> Row:
    """The object that a row is, or its DataError raised."""
    row = parsed(line, origin)
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise origin.error("row", f"got {got(row)}", "an object")
    return row


def text(row: Row, key: str, origin: Origin) -> str:
    if not isinstance(value := required(row, key, origin), str):
        raise origin.error(key, f"got {got(value)}", "a string")
    return value


def required(row: Row, key: str, origin: Origin) -> Any:
    if row.get(key) is None:
        wrong = f"missing{nearest(key, map(str, row))}, the row's keys are: {listed(row)}"
        raise origin.error(key, wrong, "this key")
    return row[key]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def single_spaced(content: str) -> str:
    """Without runs of spaces and tabs, as the KTO paper's code has its texts."""
    return _SPACES.sub(" ", content)


def got(value: object) -> str:
    return f"{brief(reprlib.repr(value))} ({type(value).__name__})"
