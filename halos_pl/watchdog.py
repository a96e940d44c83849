"""Who keeps the others waiting: a hung collective ends with a message that names the rank."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

STATUS = 75
"""Of a process that the watchdog ends (EX_TEMPFAIL: starting again may help)."""


@dataclass(frozen=True)
class Beat:
    """Where a rank was last seen."""

    count: int  # places that it has passed: comparable, since all ranks pass the same ones
    where: str
    since: float  # seconds since it got there, as of `told`
    told: float  # seconds since the epoch
    host: str
    pid: int


@dataclass(frozen=True)
class _Place:
    count: int
    where: str
    at: float  # of time.monotonic
    limited: bool


class Watchdog:
    """A thread beside each rank that tells the others where this rank is, and ends the process when it stands still.

    Nothing is asked of a rank but to say where it is (`beat`), which costs no more than an assignment.

    Args:
        timeout: seconds at one place before the process is ended.
        rank: of this process.
        world: number of ranks.
        store: of torch.distributed, which all ranks see; used by the thread alone.
        at_end: called before the process ends.
    """

    def __init__(
        self, timeout: float, rank: int, world: int, store: Any, at_end: Callable[[], None] = lambda: None
    ) -> None:
        self.timeout, self.rank, self.world, self.store, self.at_end = timeout, rank, world, store, at_end
        self.interval = min(10.0, timeout / 5)
        self._place = _Place(0, "the start", time.monotonic(), limited=False)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Leave the run alone from here on; another rank may still read where this one was."""
        self._stop.set()

    def beat(self, where: str, *, limited: bool = True) -> None:
        """Note a place that the run has come to.

        Args:
            where: in words that complete "rank 1 is in".
            limited: whether staying there for `timeout` is a fault; saving or sampling may take as long as they like.
        """
        self._place = _Place(self._place.count + 1, where, time.monotonic(), limited)

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            place = self._place
            still = time.monotonic() - place.at
            with suppress(Exception):  # the store is gone when the rank that keeps it has ended
                self.store.set(self._key(self.rank), json.dumps(asdict(self._own(place))))
            if place.limited and still > self.timeout and place is self._place and not self._stop.is_set():
                self._end(place)

    def _own(self, place: _Place) -> Beat:
        since = time.monotonic() - place.at
        return Beat(place.count, place.where, since, time.time(), socket.gethostname(), os.getpid())

    def _key(self, rank: int) -> str:
        return f"halos_pl/beat/{rank}"

    def _end(self, place: _Place) -> None:
        told = accusation(self.rank, self._own(place), self._others(), self.world, self.interval)
        print(f"halos_pl: error: {told}", file=sys.stderr, flush=True)
        with suppress(Exception):
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=False)
            self.at_end()
        os._exit(STATUS)

    def _others(self) -> dict[int, Beat]:
        """What the store has of the other ranks; those that it has nothing of, or not in time, are left out."""
        found: dict[int, Beat] = {}

        def read() -> None:
            for rank in range(self.world):
                with suppress(Exception):
                    if rank != self.rank and self.store.check([self._key(rank)]):
                        found[rank] = Beat(**json.loads(self.store.get(self._key(rank))))

        reader = threading.Thread(target=read, daemon=True)  # a store whose process is stopped never answers
        reader.start()
        reader.join(max(5.0, self.interval))
        return dict(found)


def accusation(rank: int, own: Beat, others: Mapping[int, Beat], world: int, interval: float) -> str:
    """The message of a rank that has stood still for too long.

    Args:
        rank: of the process that speaks.
        own: where it is.
        others: where the other ranks were when last heard of; a rank that was never heard of is missing.
        world: number of ranks.
        interval: seconds between two tellings of one rank.
    """
    waited = f"rank {rank} has been {_seconds(own.since)} in {own.where}"
    missing = [r for r in range(world) if r != rank and r not in others]
    beats = {rank: own, **others}
    last = min(beat.count for beat in beats.values())
    behind = [r for r in sorted(beats) if beats[r].count == last]
    silent = [r for r, beat in others.items() if own.told - beat.told > 3 * interval + 5]
    if missing:
        guilty = f"rank {_list(missing)} cannot be asked: the process has ended, or never began"
    elif silent:
        guilty = "; ".join(
            f"rank {r} no longer answers: its process ({_place(others[r])}) has ended or is stopped, it was last seen "
            f"{_seconds(own.told - others[r].told + others[r].since)} ago in {others[r].where}"
            for r in silent
        )
    elif len(behind) == len(beats):
        guilty = "all ranks stand at the same place: the network between them, or a device, does not answer"
    else:
        guilty = "; ".join(
            f"rank {r} holds the others up: for {_seconds(beats[r].since)} in {beats[r].where} ({_place(beats[r])})"
            for r in behind
        )
    return f"{waited}; {guilty}. Ended after --guards.timeout with status {STATUS}; go on with --ckpt_path last"


def _place(beat: Beat) -> str:
    return f"host {beat.host}, process {beat.pid}"


def _seconds(x: float) -> str:
    return f"{x:.0f} s" if x < 120 else f"{x / 60:.0f} min"


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
