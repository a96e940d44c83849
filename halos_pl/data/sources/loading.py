"""All records of sources that are small enough to be held."""

from __future__ import annotations

from dataclasses import dataclass

from halos_pl.data.records import BadRows, DataError, OnBadRow, Record, parse_record
from halos_pl.data.sources.reading import read_rows
from halos_pl.data.sources.source import Source, as_sources


@dataclass(frozen=True)
class Loaded:
    """Records in the order of their sources, and the messages about rows that were left out."""

    records: list[Record]
    bad: list[str]


def load_records(
    spec: str | Source | list[str | Source], split: str | None = None, *, on_bad_row: OnBadRow = "error"
) -> Loaded:
    """All records of one source or several.

    Args:
        spec: what `as_sources` takes.
        split: of the sources that name none, as `read_rows` takes it.
        on_bad_row: "error" raises one DataError about the first ten bad rows; "skip" goes on without them.

    Raises:
        DataError: as `read_rows` and `parse_record` do, and where no row is left.
    """
    records: list[Record] = []
    bad = BadRows(on_bad_row)
    sources = as_sources(spec, split)
    for source in sources:
        for origin, row in read_rows(source):
            with bad.caught():
                if isinstance(row, DataError):
                    raise row
                records.append(parse_record(row, origin))
    bad.finish()
    if not records:
        why = f"all {len(bad.messages)} are bad, the first: {bad.messages[0]}" if bad.messages else "no source is given"
        raise DataError(f"{', '.join(x.name for x in sources)}: no row can be used; {why}")
    return Loaded(records, bad.messages)
