"""What identifies the rows of a source, so that what was made of them can be found again."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path

from halos_pl.data.records import DataError
from halos_pl.data.sources import files, hub
from halos_pl.data.sources.archives import BLOCK, Snapshot
from halos_pl.data.sources.hub import Place
from halos_pl.data.sources.reading import resolve
from halos_pl.data.sources.source import Source
from halos_pl.nano import grammar, wishes
from halos_pl.nano.shipped import TEXTS


def fingerprint(source: Source) -> str:
    """Hex digest of a source's content and of how it is read.

    Of local files, it is of their bytes, sizes and names; of a hub dataset, of what `datasets` knows it by. `limit` and
    `weight` change no row and are no part of it, but the limit of a streamed dataset is.

    Raises:
        DataError: no such source, or it cannot be read.
    """
    place = resolve(source)
    columns = sorted((source.columns or {}).items())
    limit = source.limit if source.streaming else None
    how = [source.reader, source.split, columns, source.bounds, limit]
    digest = blake2b(json.dumps(how).encode(), digest_size=16)
    if isinstance(place, Path):
        for file in files.members(place):
            _add(digest, file)
    elif isinstance(place, Place):
        digest.update(f"{place} {place.arguments} {hub.fingerprint(place)}".encode())
    else:
        code = b"".join(Path(x).read_bytes() for x in (grammar.__file__, wishes.__file__))
        digest.update(f"{place} {TEXTS}".encode() + code)
    return digest.hexdigest()


def _add(digest: blake2b, file: Path) -> None:
    block = bytearray(BLOCK)
    try:
        with Snapshot(file) as content:
            digest.update(f"\0{file.name}\0{content.size}\0".encode(errors="surrogateescape"))
            while count := content.readinto(block):
                digest.update(memoryview(block)[:count])
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
