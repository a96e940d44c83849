"""Hub datasets, by `datasets.load_dataset`; its cache serves without a network. No code of theirs is ever run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from halos_pl.data.records import DataError, Origin
from halos_pl.data.sources.rows import Rows

_NAME = re.compile(r"(?P<name>[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?)(@(?P<revision>\w[\w.-]*))?", re.ASCII)
BATCH = 1000


@dataclass(frozen=True)
class Place:
    """A split of a hub dataset.

    Args:
        name: of the dataset, or a local folder.
        split: default: train.
        config: of several that the dataset has.
        data_dir: a folder of it.
        revision: a branch, tag or commit.
        streaming: iterate without downloading the whole.
    """

    name: str
    split: str | None = None
    config: str | None = None
    data_dir: str | None = None
    revision: str | None = None
    streaming: bool = False

    def __str__(self) -> str:
        return f"{self.name}[{self.split or 'train'}]"

    @property
    def arguments(self) -> dict[str, str]:
        given = {"name": self.config, "data_dir": self.data_dir, "revision": self.revision}
        return {key: value for key, value in given.items() if value is not None}


def parse_name(text: str) -> tuple[str, str | None]:
    """Name and revision of `owner/name`, `name` or `owner/name@revision`.

    Raises:
        DataError: a URL, a path, anything else that no dataset can be called.
    """
    match = _NAME.fullmatch(text)
    if match is None or ".." in text:
        raise DataError(f"{text!r}: neither a local file or folder nor a name of a hub dataset (owner/name)")
    return match["name"], match["revision"]


def read(place: Place | str, split: str | None = None) -> Rows:
    """Rows of a split.

    Raises:
        DataError: where the dataset cannot be loaded, for whatever reason, or has no rows.
    """
    place = Place(place, split) if isinstance(place, str) else place
    data = _load(place)
    number = 0
    try:
        for number, row in enumerate(data if place.streaming else _plain(data), 1):
            yield Origin(str(place), number), row
    except Exception as error:  # a border: a lost connection, a damaged cache
        raise DataError(f"{place}: stopped after row {number}: {type(error).__name__}: {error}") from error
    if not number:
        raise DataError(f"{place.name}: no rows in split {place.split or 'train'!r}")


def fingerprint(place: Place) -> str:
    """What changes where the dataset does: of its cached split, or of the builder where it is streamed.

    Raises:
        DataError: as `read`.
    """
    if not place.streaming:
        return str(_load(place)._fingerprint)
    import datasets

    try:
        builder = datasets.load_dataset_builder(place.name, **place.arguments)
    except Exception as error:  # a border, as below
        raise _unloadable(place, error) from error
    return f"{builder.config_id}-{builder.hash}"


def count(place: Place) -> int | None:
    """The rows of a split, None where it is streamed."""
    return None if place.streaming else len(_load(place))


def _load(place: Place) -> Any:
    import datasets  # seconds to import, and only for this

    streaming = {"streaming": True} if place.streaming else {}
    try:
        return datasets.load_dataset(place.name, split=place.split or "train", **place.arguments, **streaming)
    except Exception as error:  # a border: missing, private, offline, scripted, no such split, unreadable ...
        raise _unloadable(place, error) from error


def _plain(data: Any) -> Any:
    """Rows as Python values, by the thousand: images and audio stay as they are stored."""
    for batch in data.with_format("arrow").iter(BATCH):
        yield from batch.to_pylist()


def _unloadable(place: Place, error: Exception) -> DataError:
    return DataError(
        f"{place.name!r} is not a local file or folder, and split {place.split or 'train'!r} of a hub dataset of this "
        f"name could not be loaded: {type(error).__name__}: {error}"
    )
