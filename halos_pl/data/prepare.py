"""From a source to its tokenized records: once, by several processes where it is large, and found again later.

Tokens lie in a folder of the cache that is named after all that they depend on: the source's content and how it is
read, tokenizer, template, and the versions of the code. A folder is filled block by block, each file whole or not
there, so that a process that was killed is followed by one that goes on; `complete.json`, written last, says that all
are there.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Literal

import tokenizers
import transformers
from filelock import FileLock, Timeout

from halos_pl.data.progress import Progress
from halos_pl.data.records import LISTED, BadRows, DataError, DataWarning, OnBadRow, Origin, Record, parse_record
from halos_pl.data.sources import Source, count_rows, fingerprint, parsed, read_rows
from halos_pl.data.store import Bad, bad_of, write_block
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.views import each_turn

VERSION = 1  # of the files, and of how rows become tokens
BLOCK = 8192  # rows of a source in a file
CHUNK = 1024  # records tokenized at once
LARGE = 50_000  # rows from which on several processes pay
Turns = Literal["last", "all"]
_LIBRARIES = (transformers.__version__, tokenizers.__version__)


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
    """

    encoder: CompletionTokenizer
    on_bad_row: OnBadRow = "error"
    turns: Turns = "last"
    cache: Path | None = None
    workers: int | None = None

    def __call__(self, source: Source) -> Prepared:
        """Tokenize a source, or find its tokens.

        Raises:
            DataError: no such source, and, unless they are skipped, bad rows.
        """
        folder = (self.cache or cache_folder()) / self._key(source)
        done = folder / "complete.json"
        if not done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder, source):
                if not done.exists():  # else another process has tokenized it meanwhile
                    self._fill(source, folder)
        complete = json.loads(done.read_bytes())
        os.utime(done)  # when it was last used
        blocks = [folder / _name(i) for i in range(complete["blocks"])]
        bad = [(file, row, message) for file, row, message in complete["bad"]]
        self._refuse(bad)
        return Prepared(source, blocks, bad)

    def _key(self, source: Source) -> str:
        """Of the folder. The other ranks that Lightning starts take that of the first one: a log may have grown."""
        how = _digest(source, self.encoder.identity, self.turns, VERSION, BLOCK, *_LIBRARIES)
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

    def _fill(self, source: Source, folder: Path) -> None:
        rows = count_rows(source)
        job = _Job(source, self.encoder, folder, self.turns, LISTED if self.on_bad_row == "error" else None)
        workers = self.workers or (_cores() if rows is not None and rows >= LARGE and not source.streaming else 1)
        with Progress(f"tokenizing {source.name}", rows) as progress:
            blocks = job.run(0, 1, progress) if workers == 1 else _in_processes(job, workers, progress)
        bad = [row for i in range(blocks) if (path := folder / _name(i)).exists() for row in bad_of(path)]
        self._refuse(bad)
        temporary = folder / f"complete.json.{os.getpid()}"
        temporary.write_text(json.dumps({"blocks": blocks, "bad": bad}), encoding="utf-8")
        os.replace(temporary, folder / "complete.json")


@dataclass(frozen=True)
class _Job:
    """What every process does: go through the whole source, and tokenize its own blocks."""

    source: Source
    encoder: CompletionTokenizer
    folder: Path
    turns: Turns
    stop_after: int | None  # bad rows

    def run(self, part: int, parts: int, progress: Progress | None = None) -> int:
        """Returns the number of the source's blocks, or of those until too many bad rows were there."""
        bad, number = 0, 0
        rows = read_rows(self.source, lazy=True)
        while block := list(islice(rows, BLOCK)):
            path = self.folder / _name(number)
            if number % parts == part:
                if not _whole(path):
                    self._write(path, block)
                bad += len(bad_of(path))
            number += 1
            if progress is not None:
                progress.advance(len(block))
            if self.stop_after is not None and bad >= self.stop_after:
                break
        return number

    def _write(self, path: Path, rows: list[tuple[Origin, object]]) -> None:
        bad: list[Bad] = []
        encoded = []
        records = self._records(rows, bad)
        while chunk := list(islice(records, CHUNK)):
            for record, ids in zip(chunk, self.encoder.encode_records(chunk), strict=True):
                if isinstance(ids, DataError):
                    bad.append((record.origin.file, record.origin.row, str(ids)))
                else:
                    encoded.append((record, ids))
        order = {(origin.file, origin.row): i for i, (origin, _) in enumerate(rows)} if bad else {}
        write_block(path, encoded, sorted(bad, key=lambda x: order[x[:2]]))

    def _records(self, rows: list[tuple[Origin, object]], bad: list[Bad]) -> Iterator[Record]:
        for origin, raw in rows:
            try:
                if isinstance(row := parsed(raw, origin), DataError):
                    raise row
                record = parse_record(row, origin)
            except DataError as error:
                bad.append((origin.file, origin.row, str(error)))
                continue
            yield from each_turn(record) if self.turns == "all" else (record,)


def _in_processes(job: _Job, workers: int, progress: Progress) -> int:
    """Blocks in turn to each process. They are forked where the system can: nothing is imported anew."""
    fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    context = multiprocessing.get_context("fork" if fork else "spawn")
    with warnings.catch_warnings(), ProcessPoolExecutor(workers, context, _begin, (os.getpid(),)) as pool:
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        runs: set[Future[int]] = {pool.submit(job.run, part, workers) for part in range(workers)}
        waiting = runs
        while waiting:
            done, waiting = wait(waiting, timeout=0.5)
            for run in done:
                run.result()
            progress.reach(BLOCK * sum(1 for x in job.folder.iterdir() if x.suffix == ".arrow"))
    return max(run.result() for run in runs)


def _digest(*parts: object) -> str:
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _begin(parent: int) -> None:
    """In a process of its own: one core, no search for garbage among what was there before, an end with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _name(block: int) -> str:
    return f"{block:06d}.arrow"


def _whole(path: Path) -> bool:
    try:
        bad_of(path)
    except OSError:
        return False
    return True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _alone(folder: Path, source: Source) -> Iterator[None]:
    """A lock that only one process holds at a time; it goes with the process."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that tokenizes {source.name}", file=sys.stderr)
        lock.acquire()
    with lock:
        lock.release()  # of the two times that it is held now
        yield


def cache_folder() -> Path:
    """HALOS_CACHE, else `halos_pl` in XDG_CACHE_HOME or ~/.cache; where that cannot be written, a temporary one."""
    base = os.environ.get("HALOS_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base).expanduser() if base else Path(home) / "halos_pl"
    try:
        (folder / "tokens").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "tokens"):
            return folder / "tokens"
    except OSError as error:
        warnings.warn(f"no cache in {folder} ({error}): tokens go to a temporary folder", DataWarning, stacklevel=2)
        return Path(tempfile.mkdtemp(prefix="halos_pl-"))
