"""Checkpoints through the command line: what is damaged, full or too small is told in one message, status 2."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

import halos_pl.cli  # noqa: F401  lightning's log handlers keep the stderr of their import: not one that a test captured
from halos_pl.__main__ import main
from halos_pl.callbacks import RunReport
from halos_pl.checkpoints import callback, open_checkpoint
from halos_pl.resume import noise_seed

Fit = Callable[..., int]
EARLY = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]


@pytest.fixture
def fit(tmp_path: Path, tiny_model: Path, thumbs_file: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """`fit --name mine` in an empty folder: two epochs of three steps."""
    monkeypatch.chdir(tmp_path)
    lines = thumbs_file.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:12]), encoding="utf-8")
    (tmp_path / "held-out.jsonl").write_text("".join(lines[12:18]), encoding="utf-8")

    def fit(*argv: str, command: str = "fit") -> int:
        options = {
            "config": "recipes/kto.yaml",
            "name": "mine",
            "model.policy": tiny_model,
            "model.optimizer.lr": 1e-2,
            "data.train": "rows.jsonl",
            "data.validation": "held-out.jsonl",
            "data.batch_size": 4,
            "trainer.max_epochs": 2,
            "trainer.log_every_n_steps": 2,
            "trainer.accelerator": "cpu",
            "trainer.enable_progress_bar": "false",
        }
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["halos_pl", command, *words, *argv])
        return main()

    return fit


def folder(name: str = "mine") -> Path:
    return Path("runs", name, "checkpoints")


def last(name: str = "mine") -> dict[str, Any]:
    return open_checkpoint(folder(name) / "last.ckpt").load()


def same(a: str, b: str) -> bool:
    """Parameters and optimizer state, bit for bit, and the curves but for the speed."""

    def tensors(name: str) -> list[torch.Tensor]:
        found = open_checkpoint(folder(name) / "last.ckpt").tensors()
        return [found.rows(key) for key in sorted(found.shapes)]

    def curves(name: str) -> list[dict[str, str]]:
        with Path("runs", name, "csv", "metrics.csv").open(newline="") as file:
            return [{k: x for k, x in row.items() if "per_second" not in k and x} for row in csv.DictReader(file)]

    equal = [torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True)]
    return all(equal) and curves(a) == curves(b)


def message(capsys: Any) -> str:
    """The one line on stderr that an error is."""
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("halos_pl: error:")]
    assert len(lines) == 1
    return str(lines[0])


def test_damage_is_told_before_training(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_epochs", "1") == 0
    whole = Path("whole")
    shutil.copytree(folder(), whole, symlinks=True)
    before = Path("runs/mine/csv/metrics.csv").read_bytes()
    step = folder() / "step=3.ckpt"
    names = sorted(x.name for x in step.iterdir())
    assert len(names) == 3
    capsys.readouterr()
    for name in names:
        (step / name).write_bytes((step / name).read_bytes()[:-9] + b"something")
        assert fit("--ckpt_path", "last") == 2
        assert f"step=3.ckpt/{name}" in message(capsys)
        shutil.rmtree(folder())
        shutil.copytree(whole, folder(), symlinks=True)
    assert Path("runs/mine/csv/metrics.csv").read_bytes() == before, "nothing of the run was touched"
    shutil.copytree(step, "elsewhere.ckpt")
    Path("elsewhere.ckpt", names[-1]).unlink()
    assert fit("--name", "new", "--ckpt_path", "elsewhere.ckpt") == 2
    assert f"elsewhere.ckpt/{names[-1]} is missing" in message(capsys)
    assert not Path("runs/new").exists()


def test_the_best_one_is_found_and_is_what_was_measured(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_epochs", "3", "--checkpoints.mode", "max") == 0
    with Path("runs/mine/csv/metrics.csv").open(newline="") as file:
        measured = [float(x["val/loss"]) for x in csv.DictReader(file) if x["val/loss"]][1:]
    scores = json.loads((folder() / "scores.json").read_text())
    assert list(scores.values()) == measured
    best = max(scores, key=lambda s: scores[s])
    assert (folder() / "best.ckpt").readlink().name == f"step={best}.ckpt"
    capsys.readouterr()
    assert fit("--ckpt_path", "best", command="validate") == 0
    assert f"{scores[best]:.4f}"[:6] in capsys.readouterr().out


def test_options_that_cannot_be_honoured(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for argv, told in (
        (["--checkpoints.keep", "0"], "checkpoints.keep must be at least 1, got 0"),
        (["--checkpoints.every_n_steps", "0"], "checkpoints.every_n_steps must be at least 1"),
        (["--checkpoints.mode", "least"], "mode"),
        (["--checkpoints.monitor", "val/lss"], "--checkpoints.monitor val/lss: no such value; a validation logs val/"),
        (["--checkpoints.monitor", "val/kl", "--trainer.limit_val_batches", "0"], "there are no held-out rows"),
    ):
        assert fit(*argv) == 2
        assert told in message(capsys)
        assert not Path("runs").exists()
    monkeypatch.setattr(callback.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**18))
    assert fit() == 2
    assert "need 0.00 GiB more, and runs/mine/checkpoints has 0.00 GiB free" in message(capsys)
    assert not Path("runs").exists()


def test_without_checkpoints(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.enable_checkpointing", "false") == 0
    assert not folder().exists()
    assert fit("--ckpt_path", "last") == 2
    assert "runs/mine holds no such checkpoint" in message(capsys)
    assert fit("--name", "dry", "--trainer.fast_dev_run", "true", "--checkpoints.every_n_steps", "1") == 0
    assert not Path("runs/dry").exists()


def test_early_stopping_and_another_checkpoint_callback(fit: Fit) -> None:
    """Both keep their state: a run that is resumed at every epoch ends where the other does."""
    more = ["--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.dirpath", "theirs"]
    stopping = [*EARLY, "--trainer.callbacks.mode", "max", "--trainer.callbacks.patience", "2", *more]
    assert fit("--name", "whole", "--trainer.max_epochs", "5", *stopping) == 0
    ended = last("whole")["global_step"]
    assert ended == 9, "the loss falls: the first validation is the best, then two are worse"
    assert fit("--trainer.max_epochs", "5", "--trainer.max_steps", "3", "--model.schedule", "constant", *stopping) == 0
    assert fit("--trainer.max_epochs", "5", "--ckpt_path", "last", *stopping) == 0
    assert last()["global_step"] == ended
    assert [x.name for x in Path("theirs").iterdir() if x.is_dir()]


def dies(fit: Fit, monkeypatch: pytest.MonkeyPatch, step: int, hook: str, *argv: str) -> None:
    """A run whose process ends at a hook of the report, as far as a test can: whatever comes after is never done."""
    real = getattr(RunReport, hook)

    def death(self: RunReport, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.global_step >= step:
            raise SystemExit("died")
        real(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunReport, hook, death)
        with pytest.raises(SystemExit, match="died"):
            fit(*argv)


def test_a_run_that_died_before_its_first_checkpoint_begins_again(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit("--name", "whole") == 0
    dies(fit, monkeypatch, 2, "on_train_batch_end")
    assert not (folder() / "last.ckpt").exists()
    assert Path("runs/mine/csv/metrics.csv").exists()
    capsys.readouterr()
    assert fit() == 2
    assert (
        "runs/mine holds an earlier run; take another name; it has no checkpoint: --ckpt_path last begins"
        in message(capsys)
    )
    assert fit("--ckpt_path", "last", command="validate") == 2
    assert "runs/mine ended before its first checkpoint" in message(capsys)
    assert fit("--ckpt_path", "last") == 0
    assert "note: runs/mine ended before its first checkpoint; it begins again" in capsys.readouterr().out
    assert same("whole", "mine")


@pytest.mark.parametrize(
    ("steps", "hook"),
    [
        ("5", "on_train_end"),
        ("6", "_write"),
        pytest.param("5", "_write", marks=pytest.mark.slow),
        pytest.param("6", "on_train_end", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_died_before_its_export_makes_it(
    steps: str, hook: str, fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last validation, the last row and the exported policy are those of a quiet run; and once is enough."""
    assert fit("--name", "whole", "--trainer.max_steps", steps) == 0
    dies(fit, monkeypatch, int(steps), hook, "--trainer.max_steps", steps)
    assert not Path("runs/mine/policy").exists()
    written = (folder() / "last.ckpt").stat().st_ino
    assert fit("--ckpt_path", "last", "--trainer.max_steps", steps) == 0
    assert (folder() / "last.ckpt").stat().st_ino == written, "what it goes on from is not written anew"
    assert same("whole", "mine")
    policies = [Path("runs", name, "policy", "model.safetensors").read_bytes() for name in ("whole", "mine")]
    assert policies[0] == policies[1]
    tables = [Path("runs", name, "policy", "README.md").read_text().split("| val/")[1:] for name in ("whole", "mine")]
    assert tables[0] == tables[1]
    Path("runs/mine/policy/README.md").write_text("mine")
    capsys.readouterr()
    assert fit("--ckpt_path", "last", "--trainer.max_steps", steps) == 0
    assert f"this run had ended at step {steps}" in capsys.readouterr().out
    assert Path("runs/mine/policy/README.md").read_text() == "mine"
    assert same("whole", "mine")


@pytest.mark.parametrize("step", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_row_of_the_step_that_was_saved_is_neither_lost_nor_mixed(
    step: int, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2 and 4 are logged; the checkpoint of such a step must not hold the sums of its row."""
    more = ["--checkpoints.every_n_steps", "1"]
    assert fit("--name", "whole", *more) == 0
    dies(fit, monkeypatch, step + 1, "on_train_batch_end", *more)
    assert open_checkpoint(folder() / "last.ckpt").step == step
    assert fit("--ckpt_path", "last", *more) == 0
    assert same("whole", "mine")


def test_dropout_is_the_same_noise(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an epoch and of an accumulation window; GPT-2 has dropout of 0.1."""
    more = ["--model.dropout", "true", "--checkpoints.every_n_steps", "1", "--data.batch_size", "2"]
    more += ["--trainer.accumulate_grad_batches", "2"]
    assert fit("--name", "whole", *more) == 0
    dies(fit, monkeypatch, 2, "on_train_batch_end", *more)
    torch.rand(7)  # whatever noise was drawn in between
    assert fit("--ckpt_path", "last", *more) == 0
    assert same("whole", "mine")
    assert fit("--name", "silent", *more, "--model.dropout", "false") == 0
    assert not same("whole", "silent")


def test_no_two_micro_batches_share_their_noise() -> None:
    def seed(seed: int, batch: int, rank: int) -> int:
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=batch))
        return noise_seed(seed, SimpleNamespace(fit_loop=loop, global_rank=rank, global_step=0, should_stop=False))  # type: ignore[arg-type]

    seeds = [seed(s, batch, rank) for s in range(3) for batch in range(12) for rank in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [seed(s, batch, rank) for s in range(3) for batch in range(12) for rank in range(3)]


def test_a_disk_that_is_full_for_the_curves(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(csv.DictWriter, "writerow", full)
    assert fit() == 2
    assert "No space left on device; once there is space, go on with" in message(capsys)


def test_a_disk_that_fills_up_in_mid_training(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("runs").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", "runs"]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        assert fit("--trainer.max_epochs", "1") == 0
        size = sum(x.stat().st_size for x in (folder() / "step=3.ckpt").iterdir())
        free = shutil.disk_usage("runs").free
        fill = Path("runs/filler")

        def fills(self: RunReport, trainer: L.Trainer, *rest: Any) -> None:
            if trainer.global_step == 4:
                fill.write_bytes(b"x" * (free - size // 2))
            self.trained = True

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(RunReport, "on_train_batch_end", fills)
            assert fit("--ckpt_path", "last") == 2
        assert "step=6.ckpt could not be written; the last one is kept: " in message(capsys)
        assert sorted(x.name for x in folder().glob("step*")) == ["step=3.ckpt"]
        fill.unlink()
        assert fit("--ckpt_path", "last") == 0
        assert last()["global_step"] == 6
    finally:
        subprocess.run(["umount", "-l", "runs"], check=True)
