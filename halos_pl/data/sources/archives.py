"""Bytes of a local file, compressed or not, as many as it had when it was opened."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

BLOCK = 2**20
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading raises where the disk or the archive fails."""


class Snapshot(io.RawIOBase):
    """A regular file up to its size at opening: lines that another process appends meanwhile are not seen.

    Raises:
        OSError: the file is none of the regular ones (a pipe would hang), cannot be opened, or becomes shorter.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        if not stat.S_ISREG(file.stat().st_mode):
            raise OSError("not a regular file")
        self._file = file.open("rb", buffering=0)
        self.size = self._left = os.fstat(self._file.fileno()).st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            return 0
        count = self._file.readinto(memoryview(buffer)[: self._left]) or 0
        if not count:
            raise OSError(f"the file became shorter while it was read: {self._left} bytes are missing")
        self._left -= count
        return count

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


@contextmanager
def opened(file: Path) -> Iterator[io.BufferedReader[Any]]:
    """What a file holds, unpacked where its name ends in .gz, .zst, .bz2 or .xz.

    Raises:
        OSError: it cannot be opened; reading raises what `UNREADABLE` lists.
    """
    with Snapshot(file) as raw, io.BufferedReader(raw, BLOCK) as packed:
        unpack = _UNPACK.get(file.suffix.lower())
        if unpack is None:
            yield packed
            return
        with io.BufferedReader(unpack(packed), BLOCK) as stream:
            yield stream


class _Members(io.RawIOBase):
    """One compressed stream after another, as parallel packers write them; unlike the standard library's readers, what
    follows the last one must be a stream too (or zeros, as .xz may be padded).

    Raises:
        EOFError, OSError, LZMAError: on reading damaged streams.
    """

    def __init__(self, packed: IO[bytes], decompressor: Callable[[], Any]) -> None:
        super().__init__()
        self._packed, self._new = packed, decompressor
        self._member = decompressor()
        self._begun = False  # the member has seen bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._member.eof:
                rest = self._member.unused_data.lstrip(b"\0")
                while not rest:
                    if not (more := self._packed.read(BLOCK)):
                        return 0
                    rest = more.lstrip(b"\0")
                self._member, self._begun = self._new(), False
            elif self._member.needs_input:
                rest = self._packed.read(BLOCK)
                if not rest:
                    if not self._begun:
                        return 0
                    raise EOFError("the archive ends before its end-of-stream marker")
            else:
                rest = b""
            self._begun = self._begun or bool(rest)
            if data := self._member.decompress(rest, len(buffer)):
                buffer[: len(data)] = data
                return len(data)


def _zstandard(packed: IO[bytes]) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), "zstd")


_UNPACK: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda packed: gzip.GzipFile(fileobj=packed, mode="rb"),
    ".zst": _zstandard,
    ".bz2": lambda packed: _Members(packed, bz2.BZ2Decompressor),
    ".xz": lambda packed: _Members(packed, partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)),
}
