"""Sources: from a file, a folder or a hub dataset to records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from halos_pl.data.records import BadRows, DataError, OnBadRow, Origin, Record, nearest, parse_record
from halos_pl.data.sources import files, hub
from halos_pl.nano.shipped import generated, locate


@dataclass(frozen=True)
class Loaded:
    """Records in the order of their sources, and the messages about rows that were left out."""

    records: list[Record]
    bad: list[str]


def read_rows(spec: str, split: str | None = None) -> Iterator[tuple[Origin, object]]:
    """Rows of one source; a DataError in a row's place stands for a row that could not be read.

    Args:
        spec: a JSON, JSONL or Parquet file, a folder of these, the name of a hub dataset, or a `nano:` name of what
            ships.
        split: local rows whose `split` field (else whose file's name) says so; the hub's split (default: train).

    Raises:
        DataError: where there is no such source, it holds no rows or not the split, or cannot be read at all.
    """
    if (rows := generated(spec)) is not None:
        if split is not None:
            raise DataError(f"{spec}: a generated text has no splits, and {split!r} was asked for")
        return ((Origin(spec, number), row) for number, row in enumerate(rows, 1))
    try:
        path = Path(spec := locate(spec)).expanduser()
    except ValueError as error:
        raise DataError(str(error)) from error
    if spec and path.exists():
        return files.read(path, split)
    if not spec or path.suffix in files.READERS or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        siblings = [x.name for x in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{spec!r}: no such file or folder{nearest(path.name, siblings)}")
    if mistyped := nearest(spec, (x.name for x in Path.cwd().iterdir() if x.suffix in files.READERS), cutoff=0.8):
        raise DataError(f"{spec!r}: no such file{mistyped}")  # at once, and not after a look on the hub
    return hub.read(spec, split)


def load_records(spec: str | list[str], split: str | None = None, *, on_bad_row: OnBadRow = "error") -> Loaded:
    """All records of one source or several.

    Args:
        spec: what `read_rows` takes, or a list of it.
        split: as `read_rows` takes it.
        on_bad_row: "error" raises one DataError about the first ten bad rows; "skip" goes on without them.

    Raises:
        DataError: as `read_rows` and `parse_record` do, and where no row is left.
    """
    records: list[Record] = []
    bad = BadRows(on_bad_row)
    for one in [spec] if isinstance(spec, str) else spec:
        for origin, row in read_rows(one, split):
            with bad.caught():
                if isinstance(row, DataError):
                    raise row
                records.append(parse_record(row, origin))
    bad.finish()
    if not records:
        why = f"all {len(bad.messages)} are bad, the first: {bad.messages[0]}" if bad.messages else "no source is given"
        raise DataError(f"{spec}: no row can be used; {why}")
    return Loaded(records, bad.messages)
