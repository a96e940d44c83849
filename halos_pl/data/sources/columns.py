"""Rows of any reader, adapted: columns under our names, labels made of scores."""

from __future__ import annotations

from collections.abc import Mapping

from halos_pl.data.messages import listed
from halos_pl.data.sources.rows import Rows, parsed


def renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """Rows with our keys in the place of the file's columns; a DataError for a row that lacks one of them."""
    for origin, line in rows:
        row = parsed(line, origin)
        if not isinstance(row, Mapping):
            yield origin, row
            continue
        known = getattr(row, "header", row)  # the empty cells of a table are absent, but the column is there
        if absent := [x for x in columns.values() if x not in known]:
            wrong = f"no such column, the row's keys are: {listed(known)}"
            yield origin, origin.error(absent[0], wrong, f"the columns {', '.join(columns.values())}")
            continue
        own = {key: row[column] for key, column in columns.items() if column in row}
        if columns.get("completion") is not None and hasattr(row, "header"):
            own.setdefault("completion", "")
        if isinstance(score := own.get("score"), str) and hasattr(row, "header"):
            own["score"] = number(score)
        taken = {*columns.values(), *columns}
        yield origin, {**{key: value for key, value in row.items() if key not in taken}, **own}


def labelled(rows: Rows, low: float, high: float) -> Rows:
    """Rows with a label made of their score, whatever label they had; those between the bounds are left out."""
    for origin, line in rows:
        row = parsed(line, origin)
        if not isinstance(row, Mapping):
            yield origin, row
            continue
        score = row.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
            expected = "a number in every row, as `threshold` makes labels of it"
            there = "score" in row
            yield origin, origin.got("score", score, expected) if there else origin.error("score", "missing", expected)
        elif score > high or (score == high and high > low):
            yield origin, {**row, "label": True}
        elif score <= low:
            yield origin, {**row, "label": False}


def number(cell: str) -> object:
    """The number that a cell says, else the cell: what is wrong with it, the record's parser tells."""
    try:
        return float(cell)
    except ValueError:
        return cell
