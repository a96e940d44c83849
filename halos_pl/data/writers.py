"""Blocks of rows, tokenized and written by this process or by several."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from halos_pl.data.records import DataError, DataWarning, Origin, Record, parse_record
from halos_pl.data.sources import parsed
from halos_pl.data.store import Bad, Notes, notes_of, write_block
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.views import each_turn

CHUNK = 1024  # records tokenized at once
Rows = list[tuple[Origin, object]]


@dataclass(frozen=True)
class Writer:
    """Tokenizes one block of rows into its file, in whatever process.

    Args:
        encoder: tokenizes.
        all_turns: every reply of a conversation is a row.
    """

    encoder: CompletionTokenizer
    all_turns: bool

    def __call__(self, path: Path, rows: Rows) -> Notes:
        try:
            return notes_of(path)
        except OSError:  # it is not there, or not whole
            pass
        bad: list[Bad] = []
        encoded = []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", DataWarning)
            records = self._records(rows, bad)
            while chunk := list(islice(records, CHUNK)):
                for record, ids in zip(chunk, self.encoder.encode_records(chunk), strict=True):
                    if isinstance(ids, DataError):
                        bad.append((record.origin.file, record.origin.row, str(ids)))
                    else:
                        encoded.append((record, ids))
        order = {(origin.file, origin.row): i for i, (origin, _) in enumerate(rows)} if bad else {}
        bad.sort(key=lambda x: order[x[:2]])
        notes = Notes(bad, [str(x.message) for x in said if issubclass(x.category, DataWarning)])
        write_block(path, encoded, notes)
        return notes

    def _records(self, rows: Rows, bad: list[Bad]) -> Iterator[Record]:
        for origin, raw in rows:
            try:
                if isinstance(row := parsed(raw, origin), DataError):
                    raise row
                record = parse_record(row, origin)
            except DataError as error:
                bad.append((origin.file, origin.row, str(error)))
                continue
            yield from each_turn(record) if self.all_turns else (record,)


class Pool:
    """Processes that begin with the first task. They are forked where the system can: nothing is imported anew."""

    def __init__(self, workers: int, write: Writer) -> None:
        self.workers, self.write = workers, write

    def __enter__(self) -> Pool:
        return self

    @cached_property
    def _processes(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("fork" if _FORKS else "spawn")
        return ProcessPoolExecutor(self.workers, context, _begin, (os.getpid(), self.write))

    def submit(self, path: Path, rows: Rows) -> Future[Notes]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            return self._processes.submit(_write, path, rows)

    def result(self, task: Future[Notes]) -> Notes:
        try:
            return task.result()
        except BrokenProcessPool as error:
            remedy = "if memory ran out, take fewer: --data.prepare_workers 1"
            raise DataError(f"a process that tokenizes was killed; {remedy}") from error

    def __exit__(self, *error: object) -> None:
        if "_processes" in vars(self):
            self._processes.shutdown(cancel_futures=True)


_FORKS = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
_writers: list[Writer] = []  # the one of this process


def _write(path: Path, rows: Rows) -> Notes:
    return _writers[0](path, rows)


def _begin(parent: int, write: Writer) -> None:
    """In a process of its own: one core, no search for garbage among what was there before, an end with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()
    _writers[:] = [write]
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def cores() -> int:
    """How many processes pay; one where they are not forked: a script not made for that would run anew in each."""
    if not _FORKS:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
