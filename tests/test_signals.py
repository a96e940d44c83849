"""Signals are noted where they must wait, and end the program where they must not, also when Python cannot run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from halos_pl import signals
from halos_pl.signals import Preempted, Signals


def test_at_once_until_deferred() -> None:
    with Signals() as found:
        with pytest.raises(Preempted, match="ended by SIGTERM") as ended:
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.status == 143
        signal.raise_signal(signal.SIGTERM)  # it is on its way out
    with Signals() as found:
        found.deferred = True
        for which in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(which)
        assert found.received == signal.SIGUSR1, "the first"


def test_a_second_ctrl_c_does_not_wait() -> None:
    """But one that a launcher passes on, within a second, is the first one still."""
    with Signals() as found:
        found.deferred = True
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        time.sleep(1.05)
        with pytest.raises(Preempted):
            signal.raise_signal(signal.SIGINT)


def test_a_process_that_was_forked_is_no_rank() -> None:
    with Signals() as found:
        found.deferred = True
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        time.sleep(0.1)
        assert found.received == 0


STUCK = """
import sys, threading, time
from halos_pl import signals
signals.GRACE = 0.3
with signals.Signals():
    told = False
    while True:
        try:
            if not told:
                told = True
                print("ready", flush=True)
            time.sleep(60)
        except BaseException:
            pass  # as if the main thread did not come back
"""


def test_what_is_stuck_is_ended() -> None:
    run = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGUSR1)
    assert run.wait(20) == 138


def test_children_are_ended() -> None:
    patient = subprocess.Popen(["sleep", "60"])
    stubborn = subprocess.Popen(["bash", "-c", "trap '' TERM; echo ready; sleep 60"], stdout=subprocess.PIPE)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    signals.end_children([patient, stubborn], 0.2)
    assert (patient.wait(5), stubborn.wait(5)) == (-signal.SIGTERM, -signal.SIGKILL)
