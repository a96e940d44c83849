"""Rows on their way: what every reader takes and gives, and JSON read strictly."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

from halos_pl.data.records import DataError, Origin

Rows = Iterator[tuple[Origin, object]]
"""Rows with their places; bytes stand for an unparsed JSON line, a DataError for a row that could not be read."""

HEAD_ROWS, HEAD_BYTES = 100, 2**20  # how far to look for a first row that can be parsed


def parsed(row: object, origin: Origin) -> object | DataError:
    """The object that a line of JSON stands for, or the DataError why it stands for none; anything else unchanged."""
    if not isinstance(row, bytes):
        return row
    expected = "expected one JSON object a line"
    try:
        return loads(row.rstrip(b" \t\r\n").decode())
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start + 1}: not UTF-8 ({error.reason})"
    except json.JSONDecodeError as error:
        wrong = f"column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:  # a key twice, NaN, a number of too many digits, too deep a nesting
        wrong = str(error)
    return DataError(f"{origin}: {wrong}; {expected}", origin=origin)


def loads(text: str) -> Any:
    """JSON as its standard has it: NaN, Infinity and a key that stands twice in one object raise ValueError."""
    return _DECODER.decode(text)


def head(rows: Rows) -> tuple[object, Rows]:
    """The first row that can be parsed (None where the first hundred cannot), and all rows as they were."""
    seen: list[tuple[Origin, object]] = []
    size, first = 0, None
    for origin, row in rows:
        seen.append((origin, row))
        value = parsed(row, origin)
        if not isinstance(value, DataError):
            first = value
            break
        size += len(row) if isinstance(row, bytes) else 0
        if len(seen) >= HEAD_ROWS or size >= HEAD_BYTES:
            break
    return first, chain(seen, rows)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"the key {reprlib.repr(twice)} stands twice in one object")
    return row


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)
