"""What `benchmarks.reliability` starts, kills and compares: trainings forked from a parent that has imported all."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from halos_pl.checkpoints import open_checkpoint

Place = tuple[int, int, int]
"""Rank, epoch and micro-batch."""


class RowsSeen(L.Callback):
    """Appends to a file a line for each micro-batch that was trained on, its rows by their tokens.

    Args:
        folder: of the files, one a rank.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._append(trainer, f"start {trainer.global_step}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rows = [*batch.completions.blocks, *(batch.mismatched.blocks if batch.mismatched is not None else ())]
        told = " ".join(f"{crc32(row.numpy().tobytes()):08x}" for block in rows for row in block)
        self._append(trainer, f"{trainer.current_epoch} {batch_idx} {trainer.global_step} {told}")

    def _append(self, trainer: L.Trainer, line: str) -> None:
        file = os.open(self.folder / f"seen-{trainer.global_rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{line}\n".encode())
        os.close(file)


def seen(folder: Path) -> tuple[dict[Place, str], list[str]]:
    """What each micro-batch held, and what is wrong with it: a gap, a repetition without reason, other rows."""
    found: dict[Place, str] = {}
    wrong: list[str] = []
    for path in sorted(folder.glob("seen-*")):
        rank, after, steps, whole = int(path.name[5:]), -1, {0: -1}, path.read_text().split("\n")
        order: list[tuple[int, int]] = []
        for line in whole[:-1]:
            first, *rest = line.split(" ")
            if first == "start":  # it goes on from the last micro-batch of that step
                after = steps[int(rest[0])]
                continue
            here = int(first), int(rest[0])
            expected = order[after + 1] if after + 1 < len(order) else None
            if expected not in (None, here):
                wrong.append(f"rank {rank} took micro-batch {here} for {expected}")
            elif expected is None:
                order.append(here)
            after += 1
            steps.setdefault(int(rest[1]), after)  # the micro-batch that the step was taken after
            if found.setdefault((rank, *here), " ".join(rest[2:])) != " ".join(rest[2:]):
                wrong.append(f"rank {rank} saw other rows in micro-batch {here}")
        for (epoch, batch), (next_epoch, next_batch) in pairwise(order):
            if (next_epoch, next_batch) not in ((epoch, batch + 1), (epoch + 1, 0)):
                wrong.append(f"rank {rank} went from micro-batch {(epoch, batch)} to {(next_epoch, next_batch)}")
    return found, wrong


def outcome(run: Path) -> dict[str, Any]:
    """All that an undisturbed run and one that was killed must share."""
    checkpoint = open_checkpoint(run / "checkpoints" / "last.ckpt")
    tensors = checkpoint.tensors()
    values = {name: tensors.rows(name).contiguous().flatten() for name in sorted(tensors.shapes)}
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        rows = [{k: x for k, x in row.items() if x and "per_second" not in k} for row in csv.DictReader(file)]
    return {
        "step": checkpoint.step,
        "tensors": {k: hashlib.sha256(x.numpy().tobytes()).hexdigest() for k, x in values.items()},
        "policy": hashlib.sha256((run / "policy" / "model.safetensors").read_bytes()).hexdigest(),
        "curves": rows,
        "scores": json.loads((run / "checkpoints" / "scores.json").read_text()),
        "left": sorted(str(x.relative_to(run)) for x in (run / "checkpoints").iterdir()),
    }


class Training:
    """A run of the command line in forked processes, one a rank.

    Args:
        argv: of `python -m halos_pl`.
        ranks: processes.
        log: file for what they say.
    """

    def __init__(self, argv: list[str], ranks: int, log: Path) -> None:
        self.log, self.began = log, time.perf_counter()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        sys.stdout.flush()
        sys.stderr.flush()
        self.alive = [self._fork(argv, rank, ranks, port) for rank in range(ranks)]
        self.groups = list(self.alive)
        self.status = 0

    def _fork(self, argv: list[str], rank: int, ranks: int, port: int) -> int:
        if pid := os.fork():
            return pid
        status = 1
        try:
            os.setpgid(0, 0)
            if ranks > 1:
                told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                told |= {"GROUP_RANK": 0, "MASTER_PORT": port}
                os.environ.update({key: str(x) for key, x in told.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="reliability")
                rank_zero_only.rank = rank
            out = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(out, 1)
            os.dup2(out, 2)
            from halos_pl.__main__ import main

            sys.argv = ["halos_pl", *argv]
            status = main()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def running(self) -> bool:
        """Whether no rank has ended yet."""
        for pid in list(self.alive):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.alive.remove(pid)
                self.status = self.status or status
        return len(self.alive) == len(self.groups)

    def kill(self, order: list[int], gap: float = 0.0) -> None:
        """SIGKILL for each rank, in this order, with so many seconds in between; then for what they have started."""
        pids = [self.groups[i] for i in order]
        for i, pid in enumerate(pids):
            if i:
                time.sleep(gap)
            if pid in self.alive:
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            if pid in self.alive:
                os.waitpid(pid, 0)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.alive = []

    def wait(self, seconds: float) -> int:
        """The exit status of all ranks.

        Raises:
            TimeoutError: they do not end.
        """
        while self.running() or self.alive:
            if time.perf_counter() - self.began > seconds:
                self.kill(list(range(len(self.groups))))
                raise TimeoutError(f"a training did not end within {seconds:.0f} s: {self.log}")
            time.sleep(0.005)
        return self.status


def steps_there(run: Path) -> list[int]:
    """Of the whole checkpoints of a run."""
    names = (path.name for path in _names(run / "checkpoints"))
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step=(\d+)\.ckpt", name)))


def being_written(run: Path) -> int | None:
    """The step whose checkpoint is being written."""
    names = (path.name for path in _names(run / "checkpoints"))
    return next((int(found[1]) for name in names if (found := re.fullmatch(r"step=(\d+)\.ckpt\.partial", name))), None)


def _names(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        yield from os.scandir(folder)
    except FileNotFoundError:
        return
