"""When checkpoints are written, which stay, and what is refused before the first step."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities.types import TRAIN_DATALOADERS
from torch import Tensor, nn
from torch.utils.data import DataLoader

from halos_pl.checkpoints import CheckpointError, Checkpoints, FolderIO, callback, open_checkpoint, save_checkpoint
from halos_pl.checkpoints.space import estimated_bytes


class Model(L.LightningModule):
    """One weight; its held-out values are given, one a validation."""

    def __init__(self, values: list[float], held_out: bool = True) -> None:
        super().__init__()
        self.layer, self.values, self.held_out = nn.Linear(1, 1), values, held_out

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        done = 0 if self.trainer.sanity_checking else self.trainer.global_step // 4
        self.log("val/loss", self.values[done], batch_size=1)
        self.log("val/other", -self.values[done], batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["trained"] = [name for name, _ in self.named_parameters()]

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        return DataLoader(torch.ones(4, 1), batch_size=1)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.ones(1, 1)) if self.held_out else []


def fit(
    root: Path,
    ours: Checkpoints,
    *more: Callback,
    values: list[float] | None = None,
    held_out: bool = True,
    ckpt: Path | None = None,
    **options: Any,
) -> L.Trainer:
    """Epochs of four steps, a validation after each."""
    defaults: dict[str, Any] = {"max_epochs": 3, "num_sanity_val_steps": -1, "logger": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        default_root_dir=root,
        callbacks=[ours, *more],
        plugins=[FolderIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **(defaults | options),
    )
    trainer.fit(Model(values or [9.0, 3.0, 1.0, 2.0, 5.0], held_out), ckpt_path=ckpt)
    return trainer


def there(root: Path) -> dict[str, str | None]:
    """Names in the folder of checkpoints; links with what they name."""
    found = sorted((root / "checkpoints").iterdir())
    return {x.name: x.readlink().name if x.is_symlink() else None for x in found if x.name != "scores.json"}


def names(*steps: int, last: int, best: int | None = None) -> dict[str, str | None]:
    links = {"last.ckpt": f"step={last}.ckpt"} | ({} if best is None else {"best.ckpt": f"step={best}.ckpt"})
    return dict(sorted(({f"step={s}.ckpt": None for s in steps} | links).items()))


class Watch(Callback):
    """What there is after each micro-batch."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        folder = Path(trainer.default_root_dir, "checkpoints")
        self.steps.append(max((int(x.name[5:-5]) for x in folder.glob("step=*.ckpt")), default=0))
        for link in folder.glob("*.ckpt"):
            assert link.is_dir(), f"{link} names nothing"


# ------------------------------------------------------------------------------------------------ when


@pytest.mark.parametrize(
    ("given", "options", "steps"),
    [
        ({}, {}, [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8]),
        ({"every_n_steps": 1}, {}, list(range(12))),
        ({"every_n_steps": 3}, {}, [0, 0, 0, 3, 4, 4, 6, 6, 8, 9, 9, 9]),
        ({"every_n_steps": 3}, {"accumulate_grad_batches": 2}, [0, 0, 0, 0, 2, 2, 3, 3, 4, 4, 4, 4]),
        ({}, {"val_check_interval": 2}, [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]),
        ({"every_minutes": 1e-9}, {}, list(range(12))),
        ({"every_minutes": None}, {"check_val_every_n_epoch": 3}, [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8]),
        ({}, {"limit_val_batches": 0}, [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8]),
        ({}, {"max_steps": 6, "max_epochs": -1}, [0, 0, 0, 0, 4, 4]),
    ],
)
def test_when(given: dict[str, Any], options: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    watch = Watch()
    trainer = fit(tmp_path, Checkpoints(**given), watch, **options)
    assert watch.steps == steps
    assert there(tmp_path)["last.ckpt"] == f"step={trainer.global_step}.ckpt", "always at the end"


def test_a_clock_of_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 100_000, 25))
    monkeypatch.setattr(callback, "time", SimpleNamespace(monotonic=lambda: next(now)))
    watch = Watch()
    fit(tmp_path, Checkpoints(every_minutes=1.0), watch, max_epochs=1, held_out=False)
    assert watch.steps == [0, 0, 0, 3], "25 s a look: due at the third"


def test_a_run_that_is_stopped_is_saved_at_once(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    fit(tmp_path, Checkpoints(), Stop())
    assert there(tmp_path)["last.ckpt"] == "step=2.ckpt"


def test_max_time_is_a_reason_too(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Checkpoints(), max_time={"microseconds": 1})
    assert 0 < trainer.global_step < 12
    assert there(tmp_path)["last.ckpt"] == f"step={trainer.global_step}.ckpt"
    assert fit(tmp_path, Checkpoints(), ckpt=tmp_path / "checkpoints" / "last.ckpt").global_step == 12


# ------------------------------------------------------------------------------------------------ which stay


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, names(8, 12, last=12, best=8)),
        ({"mode": "max"}, names(4, 12, last=12, best=4)),
        ({"monitor": "val/other"}, names(4, 12, last=12, best=4)),
        ({"monitor": "val/other", "mode": "max"}, names(8, 12, last=12, best=8)),
        ({"keep": 2}, names(8, 12, last=12, best=8)),
        ({"keep": 3}, names(4, 8, 12, last=12, best=8)),
        ({"keep": 2, "every_n_steps": 1}, names(8, 11, 12, last=12, best=8)),
        ({"keep": 9, "every_n_steps": 5}, names(4, 5, 8, 10, 12, last=12, best=8)),
    ],
)
def test_which_stay(given: dict[str, Any], expected: dict[str, str | None], tmp_path: Path) -> None:
    fit(tmp_path, Checkpoints(**given))
    assert there(tmp_path) == expected
    assert json.loads((tmp_path / "checkpoints" / "scores.json").read_text()).keys() == {"4", "8", "12"}


@pytest.mark.parametrize(("mode", "best"), [("min", 4), ("max", 12)])
def test_what_is_not_finite_is_never_best(mode: Any, best: int, tmp_path: Path) -> None:
    fit(tmp_path, Checkpoints(mode=mode), values=[0.0, 1.0, math.nan, 2.0])
    assert there(tmp_path)["best.ckpt"] == f"step={best}.ckpt"
    other = tmp_path / "other"
    fit(other, Checkpoints(mode=mode), values=[math.nan, math.inf, -math.inf, math.nan])
    assert there(other) == names(12, last=12)


def test_of_equal_ones_the_earliest_is_best(tmp_path: Path) -> None:
    for mode in ("min", "max"):
        fit(tmp_path / mode, Checkpoints(mode=mode), values=[1.0] * 4)
        assert there(tmp_path / mode)["best.ckpt"] == "step=4.ckpt"


def test_going_on_from_an_earlier_step(tmp_path: Path) -> None:
    """What came after it counts no more, and goes as soon as something new is whole."""
    fit(tmp_path, Checkpoints(keep=9))
    folder = tmp_path / "checkpoints"
    fit(tmp_path, Checkpoints(keep=9), ckpt=folder / "step=4.ckpt", max_epochs=2, values=[9.0, 9.0, 7.0, 9.0])
    assert there(tmp_path) == names(4, 8, last=8, best=4), "step 4 was 3.0, step 8 is 7.0 now"
    assert json.loads((folder / "scores.json").read_text()) == {"4": 3.0, "8": 7.0}
    assert open_checkpoint(folder / "step=4.ckpt").step == 4


def test_what_it_goes_on_from_is_never_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, Checkpoints(), max_epochs=1)
    folder = tmp_path / "checkpoints"
    written: list[int] = []
    real = save_checkpoint
    monkeypatch.setattr(callback, "save_checkpoint", lambda c, path, **k: written.append(path.name) or real(c, path))
    fit(tmp_path, Checkpoints(), ckpt=folder / "last.ckpt", max_epochs=2)
    assert written == ["step=8.ckpt"]
    fit(tmp_path / "none", Checkpoints(), ckpt=folder / "last.ckpt", max_epochs=2)
    assert not (tmp_path / "none" / "checkpoints" / "last.ckpt").exists(), "no step was left"
    fit(tmp_path, Checkpoints(), ckpt=folder / "last.ckpt", max_epochs=2)
    assert written == ["step=8.ckpt"]


class Death(BaseException):
    """As SIGKILL, it asks nobody."""


@pytest.mark.parametrize("operation", ["replace", "symlink_to", "rename", "rmtree"])
def test_a_death_at_any_operation_leaves_a_run_that_goes_on(operation: str, tmp_path: Path) -> None:
    """Among the first operations of the last save: what `last` names is whole, and the end is that of a quiet run."""
    quiet = fit(tmp_path / "quiet", Checkpoints(), max_epochs=2)
    wanted = there(tmp_path / "quiet")
    deaths = 0
    for count in range(9):
        root = tmp_path / f"{operation}{count}"
        fit(root, Checkpoints(), max_epochs=1)
        owner: Any = {"replace": callback.os, "rmtree": shutil}.get(operation, Path)
        real, calls = getattr(owner, operation), iter(range(1000))

        def dies(*args: Any, real: Any = real, calls: Any = calls, count: int = count, **options: Any) -> Any:
            if next(calls) == count:
                raise Death
            return real(*args, **options)

        folder = root / "checkpoints"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, operation, dies)
            try:
                fit(root, Checkpoints(), ckpt=folder / "last.ckpt", max_epochs=2)
            except Death:
                deaths += 1
        assert open_checkpoint(folder / "last.ckpt").load()["global_step"] in (4, 8)
        assert not (folder / "best.ckpt").is_symlink() or open_checkpoint(folder / "best.ckpt").load()
        again = fit(root, Checkpoints(), ckpt=folder / "last.ckpt", max_epochs=2)
        assert there(root) == wanted
        assert again.global_step == quiet.global_step
    assert deaths


def test_what_a_death_left_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "step=3.ckpt.partial" / "deep").mkdir(parents=True)
    (folder / "scores.json.partial").touch()
    (folder / "last.ckpt.partial").symlink_to("nowhere")
    (folder / "scores.json").write_text("{cut")
    (folder / "mine").mkdir()
    fit(tmp_path, Checkpoints())
    assert there(tmp_path) == names(8, 12, last=12, best=8) | {"mine": None}


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0}, "checkpoints.keep must be at least 1, got 0"),
        ({"every_n_steps": 0}, "checkpoints.every_n_steps must be at least 1, got 0"),
        ({"every_minutes": 0.0}, "checkpoints.every_minutes must be above 0"),
        ({"every_minutes": math.nan}, "checkpoints.every_minutes must be above 0"),
    ],
)
def test_impossible_numbers(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpoints(**given)


def untrained(root: Path) -> None:
    assert not list(root.glob("checkpoints/step=*"))


def test_an_unknown_value_is_told_before_training(tmp_path: Path) -> None:
    watch = Watch()
    with pytest.raises(
        CheckpointError, match="monitor val/nothing: no such value; a validation logs val/loss, val/other"
    ):
        fit(tmp_path, Checkpoints(monitor="val/nothing"), watch)
    assert not watch.steps
    with pytest.raises(CheckpointError, match="monitor nothing: no such value"):
        fit(tmp_path, Checkpoints(monitor="nothing"))


def test_a_value_to_watch_without_held_out_rows(tmp_path: Path) -> None:
    watch = Watch()
    with pytest.raises(CheckpointError, match="monitor val/other: there are no held-out rows"):
        fit(tmp_path, Checkpoints(monitor="val/other"), watch, held_out=False)
    assert not watch.steps
    fit(tmp_path, Checkpoints(), held_out=False)
    assert there(tmp_path) == names(12, last=12)


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(free=31)
    monkeypatch.setattr(callback.shutil, "disk_usage", lambda path: free)
    watch = Watch()
    with pytest.raises(CheckpointError, match=r"3 at a time, need 0\.00 GiB more, and .* has 0\.00 GiB free: take"):
        fit(tmp_path, Checkpoints(), watch)
    assert not watch.steps
    free.free = 3 * (2 * 4 * 3 + 2 * 4)  # three of: weights with two moments, and a counter for each
    fit(tmp_path, Checkpoints())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be written: .*File exists"):
        fit(tmp_path, Checkpoints())


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with one message, and goes on from the last one that was whole."""
    real = callback._write

    def full(path: Path, text: str) -> None:
        if '"8"' in text:
            raise OSError(28, "No space left on device")
        real(path, text)

    monkeypatch.setattr(callback, "_write", full)
    with pytest.raises(CheckpointError, match=r"is whole, but .* cannot be kept in order: .*No space left"):
        fit(tmp_path, Checkpoints())
    monkeypatch.undo()
    assert there(tmp_path)["last.ckpt"] == "step=4.ckpt"
    fit(tmp_path, Checkpoints(), ckpt=tmp_path / "checkpoints" / "last.ckpt")
    assert there(tmp_path) == names(8, 12, last=12, best=8)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.AdamW, {"lr": 0.1}),
        (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
        (torch.optim.RMSprop, {"lr": 0.1}),
        (torch.optim.Adagrad, {"lr": 0.1}),
    ],
)
def test_the_estimate_is_the_size(optimizer: Any, options: dict[str, Any], tmp_path: Path) -> None:
    layer = nn.Linear(400, 300)
    trained = optimizer(layer.parameters(), **options)
    estimate = estimated_bytes(SimpleNamespace(optimizers=[trained]))  # type: ignore[arg-type]
    layer(torch.ones(1, 400)).sum().backward()
    trained.step()
    save_checkpoint({"state_dict": layer.state_dict(), "optimizer_states": [trained.state_dict()]}, tmp_path / "x.ckpt")
    real = sum(x.stat().st_size for x in (tmp_path / "x.ckpt").iterdir())
    assert estimate == pytest.approx(real, rel=0.05)


# ------------------------------------------------------------------------------------------------ beside others


def test_nothing_is_written_in_a_dry_run(tmp_path: Path) -> None:
    fit(tmp_path, Checkpoints(every_n_steps=1, monitor="val/nothing"), fast_dev_run=True)
    untrained(tmp_path)


def test_lightnings_own_checkpoints_beside_ours(tmp_path: Path) -> None:
    theirs = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path / "theirs", monitor="val/loss", save_top_k=2)
    fit(tmp_path, Checkpoints(), theirs)
    assert there(tmp_path) == names(8, 12, last=12, best=8)
    kept = sorted(x.name for x in (tmp_path / "theirs").iterdir())
    assert kept == ["epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"]
    for ckpt in (tmp_path / "theirs" / kept[0], tmp_path / "checkpoints" / "best.ckpt"):
        again = fit(tmp_path / ckpt.parent.name / "on", Checkpoints(), ckpt=ckpt, max_epochs=4)
        assert again.global_step == 16


def test_early_stopping_goes_on_where_it_was(tmp_path: Path) -> None:
    """Two validations without progress end a run, whether it was resumed between them or not."""
    values, options = [9.0, 1.0, 2.0, 3.0, 0.5], {"monitor": "val/loss", "patience": 2}
    assert fit(tmp_path / "a", Checkpoints(), EarlyStopping(**options), values=values, max_epochs=4).global_step == 12
    root = tmp_path / "b"
    assert fit(root, Checkpoints(), EarlyStopping(**options), values=values, max_epochs=2).global_step == 8
    ckpt = root / "checkpoints" / "last.ckpt"
    again = EarlyStopping(**options)
    assert fit(root, Checkpoints(), again, values=values, max_epochs=4, ckpt=ckpt).global_step == 12
    assert again.best_score == 1.0
    assert there(root) == names(4, 12, last=12, best=4)
