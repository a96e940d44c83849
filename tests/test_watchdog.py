"""Whom the message blames, and that a run which moves, or may take its time, is left alone."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from halos_pl.watchdog import STATUS, Beat, Watchdog, accusation

NOW = 1000.0
OWN = Beat(count=8, where="step 8", since=600, told=NOW, host="a", pid=1)


class Store:
    def __init__(self) -> None:
        self.data: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.data[key] = value

    def get(self, key: str) -> bytes:
        return self.data[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.data for key in keys)


@pytest.mark.parametrize(
    ("others", "blamed"),
    [
        (
            {1: Beat(7, "step 7", 700, NOW - 5, "b", 2), 2: Beat(8, "step 8", 600, NOW - 5, "c", 3)},
            r"rank 0 has been 10 min in step 8; rank 1 holds the others up: for 12 min in step 7 (host b, process 2). ",
        ),
        (
            {1: Beat(7, "step 7", 1, NOW - 700, "b", 2), 2: OWN},
            "rank 1 no longer answers: its process (host b, process 2) has ended or is stopped, it was last seen "
            "12 min ago in step 7",
        ),
        ({1: OWN}, "rank 2 cannot be asked"),
        ({1: replace(OWN, host="b"), 2: replace(OWN, host="c")}, "all ranks stand at the same place: the network"),
    ],
)
def test_who_is_blamed(others: dict[int, Beat], blamed: str) -> None:
    told = accusation(0, OWN, others, 3, 10.0)
    assert blamed in told
    assert told.endswith("Ended after --guards.timeout with status 75; go on with --ckpt_path last")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Statuses that the process would have ended with; its thread then does."""
    found: list[int] = []

    def end(status: int) -> None:
        found.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    return found


def watch(**options: Any) -> Watchdog:
    store = Store()
    store.set("halos_pl/beat/1", json.dumps(Beat(0, "step 1", 0.1, time.time(), "b", 2).__dict__))
    dog = Watchdog(0.3, 0, 2, store, **options)
    dog.start()
    return dog


def test_standing_still_ends_the_process(ended: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    last: list[int] = []
    dog = watch(at_end=lambda: last.append(len(ended)))
    dog.beat("step 2")
    dog._thread.join(10)
    assert ended == [STATUS]
    assert last == [0], "before the end"
    assert "rank 1 holds the others up" in capsys.readouterr().err


def test_a_run_that_moves_or_may_take_its_time_is_left_alone(ended: list[int]) -> None:
    dog = watch()
    for k in range(8):
        dog.beat(f"step {k}")
        time.sleep(0.1)
    dog.beat("saving", limited=False)
    time.sleep(0.7)
    dog.beat("step 9")
    dog.stop()
    time.sleep(0.5)
    assert ended == []
    assert Beat(**json.loads(dog.store.get("halos_pl/beat/0"))).where == "saving"
