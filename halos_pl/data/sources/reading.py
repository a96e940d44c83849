"""From a source to its rows, in the schemas that `parse_record` knows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from halos_pl.data.records import DataError, Origin, nearest
from halos_pl.data.sources import files, hub
from halos_pl.data.sources.columns import labelled, renamed
from halos_pl.data.sources.formats import FORMATS, extension
from halos_pl.data.sources.hub import Place
from halos_pl.data.sources.rows import Rows, parsed
from halos_pl.data.sources.source import Source, as_sources, exists
from halos_pl.nano.shipped import generated, locate


def read_rows(source: str | Source, split: str | None = None, *, lazy: bool = False) -> Rows:
    """Rows of one source; a DataError in a row's place stands for a row that could not be read.

    Args:
        source: a Source, or its name: as `as_sources` takes it.
        split: where the source names none: local rows whose `split` field (else whose file's name) says so; the hub's
            split (default: train).
        lazy: JSON lines that need not be looked into come as bytes, for `parsed`; to skip one costs next to nothing.

    Raises:
        DataError: where there is no such source, it holds no rows or not the split, or cannot be read at all.
    """
    (one,) = as_sources(source, split)
    rows = _read(one, resolve(one))
    return rows if lazy else ((origin, parsed(row, origin)) for origin, row in rows)


def resolve(source: Source) -> Path | Place | str:
    """Where a source lies: a path that exists, a hub dataset's split, or the name of a generated text.

    Raises:
        DataError: nothing is there, and no hub dataset can be called so.
    """
    recipe = source.recipe
    if source.path is None:
        assert recipe.hub is not None  # by the checks of Source
        theirs = recipe.splits.get(source.split or "train", source.split)
        return Place(recipe.hub, theirs, recipe.config, recipe.data_dir, streaming=source.streaming)
    if generated(source.path) is not None:
        if source.split is not None:
            raise DataError(f"{source.path}: a generated text has no splits, and {source.split!r} was asked for")
        return source.path
    try:
        name = locate(source.path)
    except ValueError as error:
        raise DataError(str(error)) from error
    if exists(name):
        return Path(name).expanduser()
    _refuse_path(name)
    hub_name, revision = hub.parse_name(name)
    return Place(hub_name, source.split, revision=revision, streaming=source.streaming)


def _refuse_path(name: str) -> None:
    """Names that cannot be meant for the hub, at once and not after a look there."""
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or extension(path) != ""
    if not name or (looks_local and "://" not in name):
        near = nearest(path.name, _siblings(path.parent)) if name else ""
        raise DataError(f"{name!r}: no such file or folder{near}")
    data = [x for x in _siblings(Path.cwd()) if Path(x).suffix in FORMATS]
    if mistyped := nearest(name, data, cutoff=0.8):
        raise DataError(f"{name!r}: no such file{mistyped}")


def _siblings(folder: Path) -> list[str]:
    try:
        return [x.name for x in folder.iterdir()]
    except OSError:
        return []


def _read(source: Source, place: Path | Place | str) -> Rows:
    recipe = source.recipe
    held_out = False
    parts: Iterator[Rows]
    if isinstance(place, Path):
        alias = recipe.splits.get(source.split or "")
        key = (source.columns or {}).get("split", "split")
        parts = files.read(place, source.split, alias=alias, key=key)
        held_out = not _is_train(source.split or files.split_of(place))
    elif isinstance(place, Place):
        parts = iter([hub.read(place)])
        held_out = not _is_train(place.split)
    else:
        parts = iter([((Origin(place, number), row) for number, row in enumerate(generated(place) or (), 1))])
    if source.columns:
        parts = (renamed(part, source.columns) for part in parts)
    rows: Rows
    if source.reader == "auto":
        rows = chain.from_iterable(recipe.read(part) for part in parts)
    else:
        read = recipe.held_out if held_out and recipe.held_out is not None else recipe.read
        rows = _some(read(chain.from_iterable(parts)), source)
    if source.bounds is not None:
        rows = labelled(rows, *source.bounds)
    return islice(rows, source.limit) if source.streaming else rows


def _is_train(split: str | None) -> bool:
    return split is None or split.startswith("train")


def _some(rows: Rows, source: Source) -> Rows:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{source.name}: the reader {source.reader!r} finds nothing to learn from in its rows")
