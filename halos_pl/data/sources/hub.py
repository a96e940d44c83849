"""Hub datasets, by `datasets.load_dataset`; its cache serves without a network."""

from __future__ import annotations

from collections.abc import Iterator

from halos_pl.data.records import DataError, Origin


def read(name: str, split: str | None = None) -> Iterator[tuple[Origin, object]]:
    """Rows of a hub dataset's split (default: train).

    Raises:
        DataError: where the dataset cannot be loaded, for whatever reason, or has no rows.
    """
    import datasets  # seconds to import, and only for this

    split = split or "train"
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # a border: missing, private, offline, scripted, no such split, unreadable ...
        raise DataError(
            f"{name!r} is not a local file or folder, and split {split!r} of a hub dataset of this name could not be "
            f"loaded: {type(error).__name__}: {error}"
        ) from error
    if not len(rows):
        raise DataError(f"{name}: no rows in split {split!r}")
    for number, row in enumerate(rows, 1):
        yield Origin(f"{name}[{split}]", number), row
