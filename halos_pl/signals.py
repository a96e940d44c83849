"""SIGTERM, SIGUSR1 and Ctrl-C: noted at once, acted on where the run can be saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from subprocess import Popen
from types import FrameType
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
GRACE = 10.0
"""Seconds that an end at once may take before the process is left as it is."""


class Preempted(BaseException):
    """A signal ended the run.

    Args:
        signum: the signal.
        told: what became of the run.
    """

    def __init__(self, signum: int, told: str = "") -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}{told}")
        self.signum = signum
        self.status = 128 + signum


class Signals:
    """The signals that end a run, for the time of a `with`.

    Until `deferred` is set a signal raises Preempted where the program stands. From then on it is only noted in
    `received`, for the run to end where it can be saved; a second Ctrl-C, a second or more after the first, does not
    wait. A thread hears the signals too, for Python's own handlers wait until a collective of torch returns: where an
    end at once has not come within GRACE seconds, it ends the process with the same status.
    """

    def __init__(self) -> None:
        self.received = 0  # the first signal
        self.deferred = False
        self.children: Sequence[Popen[Any]] = ()  # ranks that this process has launched
        self._before: dict[signal.Signals, Any] = {}
        self._hurried = False
        self._interrupted = [0.0, 0.0]  # when Ctrl-C first came: as the handler saw it, as the thread did
        self._over = threading.Event()
        self._wakeup = (-1, -1, -1)  # ends of a pipe, and what stood in its place

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread() or self._before:
            return self
        self.received, self._hurried, self._interrupted = 0, False, [0.0, 0.0]
        self._before = {which: signal.getsignal(which) for which in ENDING}
        self.install()
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._wakeup = (read, write, signal.set_wakeup_fd(write, warn_on_full_buffer=False))
        self._over.clear()
        threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True).start()
        global _active
        _active = self
        return self

    def install(self) -> None:
        """Put the handlers in place (again, where something else took it)."""
        if self._before:
            for which in ENDING:
                signal.signal(which, self._on)

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        global _active
        _active = None
        self._over.set()
        signal.set_wakeup_fd(self._wakeup[2])
        for which, handler in self._before.items():
            signal.signal(which, handler)
        self._before = {}
        os.close(self._wakeup[1])  # ends the thread, which closes the other end

    def _on(self, signum: int, frame: FrameType | None) -> None:
        self.received = self.received or signum
        if self._at_once(signum, 0) and not self._hurried:
            self._hurried = True
            raise Preempted(self.received)

    def _at_once(self, signum: int, who: int) -> bool:
        """Whether this signal ends the run where it stands."""
        again = False
        if signum == signal.SIGINT:
            again = 0 < self._interrupted[who] <= time.monotonic() - 1  # launchers pass a Ctrl-C on
            self._interrupted[who] = self._interrupted[who] or time.monotonic()
        return not self.deferred or again

    def _listen(self, pipe: int) -> None:
        told = False
        while came := os.read(pipe, 1):
            signum = came[0]
            if signum not in ENDING:
                continue
            if not self._at_once(signum, 1):
                if not told and _is_first_rank():
                    now = "; Ctrl-C again ends at once" if signum == signal.SIGINT else ""
                    name = signal.Signals(signum).name
                    print(f"halos_pl: {name}: finishing the step and saving it{now}", file=sys.stderr)
                told = True
            elif not self._over.wait(GRACE):
                end_children(self.children, 0)
                os._exit(128 + signum)
        os.close(pipe)


_active: Signals | None = None


def _is_first_rank() -> bool:
    """As far as launchers tell."""
    return next((os.environ[x] for x in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if x in os.environ), "0") == "0"


def _in_child() -> None:
    """A forked process is no rank: it has the usual handlers, and does not wake its parent's thread."""
    if _active is not None:
        signal.set_wakeup_fd(-1)
        for which in ENDING:
            signal.signal(which, signal.SIG_DFL if which != signal.SIGINT else signal.default_int_handler)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def end_children(children: Sequence[Popen[Any]], patience: float) -> None:
    """End the ranks that this process launched: SIGTERM, and after `patience` seconds SIGKILL."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    end = time.monotonic() + patience
    while any(child.poll() is None for child in children) and time.monotonic() < end:
        time.sleep(0.05)
    for child in children:
        if child.poll() is None:
            child.kill()
