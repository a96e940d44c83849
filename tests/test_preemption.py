"""A signal ends a run where it can be saved, on every rank, in time, and with the status that the documents name."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Checkpoint

import halos_pl.cli  # noqa: F401  as in test_cli.py
from halos_pl.__main__ import main
from halos_pl.checkpoints import open_checkpoint
from halos_pl.data import AlignmentData
from halos_pl.losses import SFT
from halos_pl.module import AlignmentModule
from halos_pl.preemption import Preemption
from halos_pl.run_folder import ENV
from halos_pl.signals import Preempted

LIMIT = 30  # seconds from the signal to the end of the last process

OBJECTIVE = '''
"""KTO that leaves a mark for every micro-batch, takes its time, and signals itself where SIGNAL_AT says."""
import os, signal, sys, time
from dataclasses import dataclass
from halos_pl.losses import KTO

@dataclass(frozen=True)
class Slow(KTO):
    def losses(self, scores, desirable, z0):
        rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK", "0")
        kind = "train" if scores.logp.requires_grad else "held-out"
        with open(f"{kind}-{rank}", "a") as file:
            file.write("x")
        time.sleep(float(os.environ.get("SLOW", "0")))
        at = os.environ.get("SIGNAL_AT", "").split()  # kind, micro-batch, rank, signal
        if at[:3] == [kind, str(os.path.getsize(f"{kind}-{rank}")), rank]:
            os.kill(os.getpid(), int(at[3]))
        return super().losses(scores, desirable, z0)
'''


@pytest.fixture
def options(tiny_model: Path, thumbs_file: Path, tmp_path: Path) -> list[str]:
    """A run of 24 steps of two micro-batches in the folder of the test, validated twice."""
    (tmp_path / "slow.py").write_text(OBJECTIVE)
    settings = {
        "config": "recipes/kto.yaml",
        "name": "mine",
        "model.objective": "slow.Slow",
        "model.policy": tiny_model,
        "model.optimizer.lr": 1e-3,
        "data.train": thumbs_file,
        "data.validation": thumbs_file,
        "data.batch_size": 4,
        "data.eval_batch_size": 16,
        "trainer.accumulate_grad_batches": 2,
        "trainer.max_epochs": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    return ["fit", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


Fit = Callable[..., int]


@pytest.fixture
def fit(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """The run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "slow", raising=False)
    monkeypatch.delenv(ENV, raising=False)

    def fit(*argv: str, signalled: str = "") -> int:
        monkeypatch.setenv("SIGNAL_AT", signalled)
        monkeypatch.setattr(sys, "argv", ["halos_pl", *options, *argv])
        return main()

    return fit


def steps(folder: Path) -> list[int]:
    """Of the checkpoints of the run that `last` may lead to."""
    last = (folder / "runs" / "mine" / "checkpoints" / "last.ckpt").resolve()
    return [int(re.sub(r"\D", "", last.stem)), open_checkpoint(last).step]


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


# ------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(("which", "status"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130)])
def test_the_step_is_finished_and_saved(which: str, status: int, fit: Fit, tmp_path: Path, capsys: Any) -> None:
    before = [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    assert fit(signalled=f"train 5 0 {getattr(signal, which)}") == status
    assert size(tmp_path / "train-0") == 6, "the second micro-batch of the step ran, and no other"
    assert size(tmp_path / "held-out-0") == 6, "nothing was validated but the start"
    assert steps(tmp_path) == [3, 3]
    assert not (tmp_path / "runs" / "mine" / "policy").exists(), "half a training exports nothing"
    assert f"ended by {which} after step 3, saved in runs/mine/checkpoints/step=3.ckpt" in capsys.readouterr().err
    assert [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before

    assert fit("--ckpt_path", "last") == 0
    assert steps(tmp_path) == [24, 24]
    assert (tmp_path / "runs" / "mine" / "policy").is_dir()


def test_before_the_first_step_nothing_is_kept(fit: Fit, tmp_path: Path, capsys: Any) -> None:
    assert fit(signalled=f"held-out 2 0 {signal.SIGTERM}") == 143
    assert size(tmp_path / "held-out-0") == 2
    assert "before the first step; nothing is kept" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_validation_is_left_at_its_next_batch(fit: Fit, tmp_path: Path) -> None:
    """The checkpoint is that of the step before: the run goes on as if it had been saved then."""
    argv = ("--trainer.val_check_interval", "10")  # micro-batches
    assert fit(*argv, signalled=f"held-out 8 0 {signal.SIGTERM}") == 143  # six were the start
    assert size(tmp_path / "held-out-0") == 8
    assert steps(tmp_path) == [5, 5]
    assert fit(*argv, "--ckpt_path", "last") == 0
    assert size(tmp_path / "train-0") == 48, "no micro-batch twice, none left out"
    assert size(tmp_path / "held-out-0") == 8 + 5 * 6, "that validation, the three that were due, and the closing one"
    assert steps(tmp_path) == [24, 24]


def test_a_validation_that_was_due_is_made_up_for(fit: Fit, tmp_path: Path) -> None:
    """The signal comes in the last micro-batch before it."""
    argv = ("--trainer.val_check_interval", "10")
    assert fit(*argv, signalled=f"train 9 0 {signal.SIGTERM}") == 143
    assert size(tmp_path / "held-out-0") == 6, "the start"
    assert steps(tmp_path) == [5, 5]
    assert fit(*argv, "--ckpt_path", "last") == 0
    assert size(tmp_path / "train-0") == 48
    assert size(tmp_path / "held-out-0") == 6 + 5 * 6, "that one, the three that were due, and the closing one"


def test_a_run_that_had_ended_is_still_exported(fit: Fit, tmp_path: Path, capsys: Any) -> None:
    argv = ("--trainer.limit_val_batches", "3", "--trainer.check_val_every_n_epoch", "3")  # only before and after
    assert fit(*argv, signalled=f"held-out 4 0 {signal.SIGTERM}") == 143
    assert steps(tmp_path) == [24, 24]
    assert not (tmp_path / "runs" / "mine" / "policy").exists()
    assert fit(*argv, "--ckpt_path", "last") == 0
    assert (tmp_path / "runs" / "mine" / "policy").is_dir()
    assert "held out" in capsys.readouterr().out, "the closing validation is made up for"


def test_auto_begins_and_goes_on(fit: Fit, tmp_path: Path, capsys: Any) -> None:
    """The line of a job that is requeued is one and the same each time."""
    assert fit("--ckpt_path", "auto", signalled=f"held-out 1 0 {signal.SIGTERM}") == 143
    assert (tmp_path / "runs" / "mine" / "config.yaml").exists(), "which is in nobody's way"
    assert fit("--ckpt_path", "auto", signalled=f"train 3 0 {signal.SIGUSR1}") == 138
    assert steps(tmp_path) == [2, 2]
    assert fit("--ckpt_path", "auto", "--trainer.max_steps", "4") == 0
    assert steps(tmp_path) == [4, 4]
    capsys.readouterr()
    assert fit("--ckpt_path", "auto", "--name", "null") == 2
    assert "--ckpt_path auto: of which run?" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- in Python


class Keeper(Checkpoint):
    """A checkpoint callback with a `save` of its own."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, int, int]] = []

    def save(self, trainer: L.Trainer) -> None:
        """Step; micro-batches that are not completed; those of a validation that are seen."""
        loop: Any = trainer.fit_loop.epoch_loop
        done = loop.batch_progress.current
        self.saved.append(
            (trainer.global_step, done.ready - done.completed, loop.val_loop.batch_progress.current.ready)
        )


class Closing(L.Callback):
    """Validates when training is over, as RunReport does."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True


class Signal(L.Callback):
    def __init__(self, hook: str, count: int) -> None:
        self.left = count
        setattr(self, hook, self.act)

    def act(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize(
    ("hook", "count", "saved"),
    [
        ("on_train_batch_start", 3, (2, 1, 0)),
        ("on_validation_batch_start", 2, (2, 1, 0)),  # as at the end of the step, though it is over
        ("on_train_end", 1, (4, 0, 3)),  # all is over: as it is
        ("on_validation_batch_start", 8, (4, 0, 2)),  # the same in the closing validation
    ],
)
def test_the_checkpoint_callback_saves_as_of_the_step(
    hook: str, count: int, saved: tuple[int, int, int], tiny_model: Path, thumbs_file: Path
) -> None:
    module = AlignmentModule(SFT(), policy=str(tiny_model), schedule="constant", warmup=0)
    keeper, before = Keeper(), signal.getsignal(signal.SIGUSR1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        accumulate_grad_batches=2,
        val_check_interval=4,
        limit_val_batches=3,
        num_sanity_val_steps=0,
        callbacks=[Signal(hook, count), Preemption(), Closing(), keeper],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(Preempted) as ended:
        trainer.fit(module, datamodule=AlignmentData(str(thumbs_file), str(thumbs_file), batch_size=4))
    assert ended.value.status == 138
    assert keeper.saved == [saved]
    assert signal.getsignal(signal.SIGUSR1) == before


# ------------------------------------------------------------------------------------------------- ranks

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "halos_pl"]
DDP = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def launch(options: list[str], folder: Path, *argv: str, ranks: int = 2, **env: str) -> subprocess.Popen[str]:
    start = TORCHRUN if ranks > 1 else ["-m", "halos_pl"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"} | env
    command = [sys.executable, *start, *options, *(DDP if ranks > 1 else []), *argv]
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, text=True)


def log(folder: Path) -> str:
    return (folder / "log").read_text()


def test_a_signal_to_one_rank_ends_both(options: list[str], tmp_path: Path) -> None:
    run = launch(options, tmp_path, SIGNAL_AT=f"train 5 1 {signal.SIGTERM}")
    assert run.wait(120) != 0
    assert size(tmp_path / "train-0") == size(tmp_path / "train-1") == 6, log(tmp_path)
    assert steps(tmp_path) == [3, 3]
    assert "ended by SIGTERM after step 3" in log(tmp_path)
    assert re.search(r"exitcode *: 143", log(tmp_path)), log(tmp_path)[-3000:]
    assert 'Traceback (most recent call last):\n  File "<frozen runpy>"' in log(tmp_path), "torchrun's own"
    assert "halos_pl/cli.py" not in log(tmp_path), "no traceback of ours"


def children(pid: int) -> list[int]:
    """Processes that a process launched, in the order of their ranks."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def ranks_of(run: subprocess.Popen[str]) -> dict[int, int]:
    found = {}
    for pid in children(run.pid):
        env = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        rank = next((word.partition("=")[2] for word in env if word.startswith("RANK=")), None)
        if rank is not None:
            found[int(rank)] = pid
    return found


@pytest.mark.slow
@pytest.mark.parametrize("which", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("target", ["agent", "rank 0", "rank 1", "all", "one process"])
def test_every_way_to_be_signalled(target: str, which: str, options: list[str], tmp_path: Path) -> None:
    if (target, which) in (("agent", "SIGUSR1"), ("all", "SIGUSR1")):
        pytest.skip("torchrun dies of SIGUSR1 unless --signals-to-handle names it")
    ranks = 1 if target == "one process" else 2
    run = launch(options, tmp_path, ranks=ranks, SLOW="0.2")
    while size(tmp_path / "train-0") < 5:
        assert run.poll() is None, log(tmp_path)
        time.sleep(0.05)
    by_rank = ranks_of(run) if ranks > 1 else {}
    targets = {"agent": [run.pid], "one process": [run.pid], "all": [run.pid, *by_rank.values()]}
    start = time.monotonic()
    for pid in targets.get(target) or [by_rank[int(target[-1])]]:
        os.kill(pid, getattr(signal, which))
    status = run.wait(120)
    seconds = time.monotonic() - start
    print(f"{which} to {target}: {seconds:.1f} s, status {status}")
    assert seconds < LIMIT
    assert status == (128 + getattr(signal, which) if ranks == 1 else 1)
    assert len({size(tmp_path / f"train-{rank}") for rank in range(ranks)}) == 1, "all ranks end after the same step"
    at = steps(tmp_path)[1]
    assert 2 * at == size(tmp_path / "train-0")
    assert launch(options, tmp_path, "--ckpt_path", "last", ranks=ranks).wait(120) == 0, log(tmp_path)
    assert (tmp_path / "runs" / "mine" / "policy").is_dir()
    assert steps(tmp_path)[1] == 24 // ranks


@pytest.mark.slow
@pytest.mark.parametrize("target", [0, 1])
def test_ranks_that_lightning_launches(target: int, options: list[str], tmp_path: Path) -> None:
    run = launch([*options, *DDP], tmp_path, ranks=1, SLOW="0.2")
    while size(tmp_path / "train-0") < 5:
        assert run.poll() is None, log(tmp_path)
        time.sleep(0.05)
    start = time.monotonic()
    (child,) = [pid for pid in children(run.pid) if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill((run.pid, child)[target], signal.SIGTERM)
    assert run.wait(120) == 143, log(tmp_path)
    print(f"SIGTERM to rank {target} of Lightning's launcher: {time.monotonic() - start:.1f} s")
    assert time.monotonic() - start < LIMIT
    assert not Path(f"/proc/{child}").exists()
    assert steps(tmp_path)[1] > 0


@pytest.mark.slow
def test_signals_to_ranks_before_the_first_step(options: list[str], tmp_path: Path) -> None:
    run = launch(options, tmp_path, SIGNAL_AT=f"held-out 1 1 {signal.SIGTERM}")
    start = time.monotonic()
    assert run.wait(120) == 1
    assert time.monotonic() - start < LIMIT + 20
    assert not (tmp_path / "runs" / "mine" / "checkpoints").exists()
