"""From a source to its tokenized records: once, by several processes where it is large, and found again later.

Tokens lie in a folder of the cache that is named after all that they depend on: the source's content and how it is
read, tokenizer, template, and the code. A folder is filled block by block, each file whole or not there, so that a
process that was killed is followed by one that goes on; `complete.json`, written last, says what belongs there.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import tokenizers
import transformers
from filelock import FileLock, Timeout

from halos_pl.data.progress import Progress
from halos_pl.data.records import LISTED, BadRows, DataError, DataWarning, OnBadRow, Origin
from halos_pl.data.sources import Source, count_rows, fingerprint, read_rows
from halos_pl.data.store import Bad, Notes
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.writers import Pool, Writer, cores

BLOCK = 8192  # rows of a source in a file
LARGE = 50_000  # rows from which on several processes pay
Turns = Literal["last", "all"]


@dataclass(frozen=True)
class Prepared:
    """The files of a source's tokenized records, in order, and the rows that could not be used."""

    source: Source
    blocks: list[Path]
    bad: list[Bad]


@dataclass(frozen=True)
class Preparation:
    """How sources are tokenized.

    Args:
        encoder: tokenizes.
        on_bad_row: "error" stops with a list of the first bad rows, "skip" goes on without them.
        turns: of a conversation, the last reply or each of them as a row of its own.
        cache: folder; see `cache_folder`.
        workers: processes; None: one, or for large sources as many as there are cores.
        known: what was prepared already, by its source; a log that grows is read once.
    """

    encoder: CompletionTokenizer
    on_bad_row: OnBadRow = "error"
    turns: Turns = "last"
    cache: Path | None = None
    workers: int | None = None
    known: dict[Source, Prepared] = field(default_factory=dict)

    def __call__(self, source: Source) -> Prepared:
        """Tokenize a source, or find its tokens.

        Raises:
            DataError: no such source, a cache that cannot be written, and, unless they are skipped, bad rows.
        """
        whole = replace(source, weight=1.0, limit=source.limit if source.streaming else None)
        if whole not in self.known:
            self.known[whole] = self._prepare(whole)
        return replace(self.known[whole], source=source)

    def _prepare(self, source: Source) -> Prepared:
        folder = (self.cache or cache_folder()) / self._key(source)
        complete = _complete(folder)
        if complete is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with _alone(folder, source):
                    complete = _complete(folder) or self._fill(source, folder)
            except OSError as error:
                raise DataError(f"data.cache: {folder} cannot be written: {error}") from error
        for warning in complete["warnings"]:
            warnings.warn(warning, DataWarning, stacklevel=2)
        bad = [(file, row, message) for file, row, message in complete["bad"]]
        self._refuse(bad)
        return Prepared(source, [folder / _name(i) for i in range(len(complete["sizes"]))], bad)

    def _key(self, source: Source) -> str:
        """Of the folder. The other ranks that Lightning starts take that of the first one: a log may have grown."""
        how = _digest(source, self.encoder.identity, self.turns, BLOCK, _code(), *_LIBRARIES)
        told = f"HALOS_TOKENS_{how}"
        if os.environ.get("LOCAL_RANK", "0") == "0" or told not in os.environ:
            os.environ[told] = _digest(how, fingerprint(source))
        return os.environ[told]

    def _refuse(self, bad: list[Bad]) -> None:
        told = BadRows(self.on_bad_row)
        for file, row, message in bad if self.on_bad_row == "error" else []:
            with told.caught():
                raise DataError(message, origin=Origin(file, row))
        told.finish()

    def _fill(self, source: Source, folder: Path) -> dict[str, Any]:
        """All blocks of a source; those that are there, from a process that was killed, are kept."""
        for left in folder.glob("*.arrow.*"):
            left.unlink()
        notes, rows, number = Notes([], []), count_rows(source), -1
        with warnings.catch_warnings(record=True) as said, Progress(f"tokenizing {source.name}", rows) as progress:
            warnings.simplefilter("always", DataWarning)
            for number, found in enumerate(self._blocks(source, folder, rows)):
                notes = Notes(notes.bad + found.bad, notes.warnings + found.warnings)
                progress.reach((number + 1) * BLOCK)
                if self.on_bad_row == "error" and len(notes.bad) >= LISTED:
                    break
        ours = [str(x.message) for x in said if issubclass(x.category, DataWarning)]
        for other in said:
            if not issubclass(other.category, DataWarning):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        self._refuse(notes.bad)
        sizes = [(folder / _name(i)).stat().st_size for i in range(number + 1)]
        complete = {"sizes": sizes, "bad": notes.bad, "warnings": list(dict.fromkeys(ours + notes.warnings))}
        temporary = folder / f"complete.json.{os.getpid()}"
        with temporary.open("w", encoding="utf-8") as out:
            json.dump(complete, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, folder / "complete.json")
        return complete

    def _blocks(self, source: Source, folder: Path, rows: int | None) -> Iterator[Notes]:
        """Write the blocks of a source, in order, and tell what is to be said of each. The source is read once."""
        write = Writer(self.encoder, self.turns == "all")
        several = self.workers or cores()
        first = 0 if self.workers or (rows or 0) >= LARGE else LARGE // BLOCK  # blocks until it counts as large
        content, number = read_rows(source, lazy=True), 0
        waiting: deque[Future[Notes]] = deque()
        with Pool(several, write) as pool:
            while block := list(islice(content, BLOCK)):
                path = folder / _name(number)
                number += 1
                if several == 1 or (number <= first and not waiting):
                    yield write(path, block)
                    continue
                waiting.append(pool.submit(path, block))
                if len(waiting) > 2 * several:
                    yield pool.result(waiting.popleft())
            while waiting:
                yield pool.result(waiting.popleft())


def _complete(folder: Path) -> dict[str, Any] | None:
    """What belongs into a folder, if it is all there."""
    try:
        found = json.loads((folder / "complete.json").read_bytes())
        there = [(folder / _name(i)).stat().st_size for i in range(len(found["sizes"]))]
    except (OSError, ValueError):
        return None
    return dict(found) if there == found["sizes"] else None


def _digest(*parts: object) -> str:
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


@cache
def _code() -> str:
    """Of everything that reads rows and makes tokens of them: nobody trains on what yesterday's code made."""
    here = Path(__file__).parent
    return _digest(*(path.read_bytes() for path in sorted(here.rglob("*.py"))))


_LIBRARIES = (transformers.__version__, tokenizers.__version__)


def _name(block: int) -> str:
    return f"{block:06d}.arrow"


@contextmanager
def _alone(folder: Path, source: Source) -> Iterator[None]:
    """One process at a time; the lock goes with the process. Where the file system has none, two do the same work."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that tokenizes {source.name}", file=sys.stderr)
        lock.acquire()
    except (NotImplementedError, OSError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


@cache
def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        warnings.warn(f"no cache in {folder} ({error}): tokens go to a temporary folder", DataWarning, stacklevel=3)
        temporary = tempfile.mkdtemp(prefix="halos_pl-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)


def cache_folder() -> Path:
    """`tokens` in HALOS_CACHE, else in `halos_pl` in XDG_CACHE_HOME or ~/.cache; where that cannot be written, a
    temporary folder that goes with the process."""
    base = os.environ.get("HALOS_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return _writable((Path(base).expanduser() if base else Path(home) / "halos_pl") / "tokens")
