"""When a checkpoint is written, which is the best, and which may go."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only

from halos_pl.checkpoints.errors import CheckpointError
from halos_pl.checkpoints.folder import ASIDE, save_checkpoint
from halos_pl.checkpoints.space import estimated_bytes
from halos_pl.ranks import agree

LAST, BEST, SCORES = "last.ckpt", "best.ckpt", "scores.json"
GIB = 2**30


class Checkpoints(Checkpoint):
    """Writes what a run goes on from, always after an optimizer step.

    One is written at every validation (but for one within an accumulation), at the end of every epoch, before a run
    ends or is interrupted, and so often as the arguments say. `last.ckpt` and `best.ckpt` are links. Once a new one is
    whole, the others are removed, those of later steps too where a run goes on from an earlier one.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
        every_minutes: Minutes between two checkpoints, by the clock of the first rank.
        keep: How many of the latest to keep, besides the best one.
        monitor: Logged value that says which is best, where there are held-out rows.
        mode: Whether less or more of it is better.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_minutes: float | None = 30.0,
        keep: int = 1,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"checkpoints.every_n_steps must be at least 1, got {every_n_steps}")
        if every_minutes is not None and not every_minutes > 0:
            raise ValueError(f"checkpoints.every_minutes must be above 0, got {every_minutes}")
        if keep < 1:
            raise ValueError(f"checkpoints.keep must be at least 1, got {keep}")
        self.every_n_steps, self.every_minutes, self.keep = every_n_steps, every_minutes, keep
        self.monitor, self.mode = monitor, mode
        self.folder: Path | None = None
        self._saved: int | None = None  # step of the latest one
        self._seen = 0  # step at which this was last asked
        self._since = time.monotonic()
        self._metrics: dict[str, float] = {}  # last logged values of the checkpoint that the run goes on from

    # ------------------------------------------------------------------------------------------ when

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.folder is None:
            self.folder = Path(trainer.default_root_dir, "checkpoints")
        if stage == "fit":  # ranks that torchrun started know no name that the first one has found
            self.folder = Path(trainer.strategy.broadcast(str(self.folder)))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["callback_metrics"] = {name: float(x) for name, x in trainer.callback_metrics.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._metrics = checkpoint.get("callback_metrics", {})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _dry(trainer):
            return
        self._seen, self._saved, self._since = trainer.global_step, None, time.monotonic()
        metrics = {name: torch.tensor(x, device=pl_module.device) for name, x in self._metrics.items()}
        trainer._logger_connector._callback_metrics.update(metrics)  # EarlyStopping looks again at the end of an epoch
        error = self._refuse_monitor(trainer)
        if error is None and trainer.is_global_zero:
            error = self._refuse_small_disk(trainer)
        if why := trainer.strategy.broadcast(error):
            raise CheckpointError(why)
        if trainer.is_global_zero:
            self._clear()

    def _refuse_monitor(self, trainer: L.Trainer) -> str | None:
        known = trainer.val_dataloaders is not None or not trainer.enable_validation
        if self.monitor != "val/loss" and known and not _validates(trainer):
            return f"--checkpoints.monitor {self.monitor}: there are no held-out rows (--data.validation)"
        return None

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _dry(trainer) or not self.monitor.startswith("val/"):
            return
        if _validates(trainer) and trainer.num_sanity_val_batches == trainer.num_val_batches:
            self._score(trainer)

    def _score(self, trainer: L.Trainer) -> float:
        if (score := trainer.callback_metrics.get(self.monitor)) is None:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise CheckpointError(f"--checkpoints.monitor {self.monitor}: no such value; a validation logs {known}")
        return float(score)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if _dry(trainer) or trainer.global_step == self._seen:  # in the middle of an accumulation
            return
        self._seen = trainer.global_step
        if self._due(trainer) and not self.validation_follows(trainer):  # else after the validation
            self.save(trainer)

    def validation_follows(self, trainer: L.Trainer) -> bool:
        """Whether a validation follows this micro-batch."""
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        return _validates(trainer) and fetcher is not None and bool(loop._should_check_val_fx(fetcher))

    def _due(self, trainer: L.Trainer) -> bool:
        step = trainer.global_step
        ends = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or step == trainer.max_steps
        counted = self.every_n_steps is not None and step % self.every_n_steps == 0
        if ends or counted or trainer.should_stop:
            return True
        if self.every_minutes is None:
            return False
        late = time.monotonic() - self._since >= 60 * self.every_minutes
        return bool(agree(late and trainer.is_global_zero)[0])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.global_step or _dry(trainer):
            return
        if trainer.fit_loop._should_accumulate():
            return
        self.save(trainer, self._score(trainer))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that goes on from its last step saves nothing; what an earlier start of it left to do is done here."""
        path = _origin(trainer)
        if (
            self._saved is None
            and self.folder is not None
            and path is not None
            and path.parent == self.folder.resolve()
        ):
            step = trainer.global_step
            self._tidy(self._of(step), step, self._scores().get(step))

    # ------------------------------------------------------------------------------------------ writing

    def save(self, trainer: L.Trainer, score: float | None = None) -> Path:
        """Write a checkpoint of the present step, unless there is one; on all ranks.

        Args:
            trainer: between two optimizer steps.
            score: the monitored value.

        Raises:
            CheckpointError: on every rank, where one could not write.
        """
        assert self.folder is not None
        step = trainer.global_step
        path = self.folder / f"step={step}.ckpt"
        if step != self._saved and path.resolve() != _origin(trainer):  # which is never written anew
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            save_checkpoint(checkpoint, path, full=getattr(trainer.strategy, "full_checkpoints", True))
        self._saved, self._since = step, time.monotonic()
        error = None
        try:
            self._tidy(path, step, score)
        except OSError as failure:
            error = f"the checkpoint {path} is whole, but {self.folder} cannot be kept in order: {failure}"
        if error := trainer.strategy.broadcast(error):
            raise CheckpointError(error)
        return path

    @rank_zero_only
    def _tidy(self, path: Path, step: int, score: float | None) -> None:
        """Links, and what may go: nothing that is linked, and nothing before the new one was whole.

        A death in between is mended by the next one: what the link `last` does not name counts as not saved.
        """
        assert self.folder is not None
        scores = self._scores()
        scores = {s: value for s, value in scores.items() if s < step} | ({} if score is None else {step: score})
        scored = {s: value for s, value in scores.items() if math.isfinite(value) and self._of(s).is_dir()}
        _write(self.folder / SCORES, json.dumps(scores))
        best = None
        if scored:
            best = (min if self.mode == "min" else max)(
                scored, key=lambda s: (scored[s], s if self.mode == "min" else -s)
            )
            _link(self.folder / BEST, self._of(best))
        _link(self.folder / LAST, path)
        found = sorted(self.steps())
        kept = {*[s for s in found if s <= step][-self.keep :], best}
        for s in found:
            if s not in kept:
                aside = self._of(s).with_name(f"step={s}.ckpt.old{ASIDE}")
                self._of(s).rename(aside)  # never half of one
                shutil.rmtree(aside, ignore_errors=True)

    def steps(self) -> list[int]:
        """Of the checkpoints that there are."""
        assert self.folder is not None
        names = [path.name[5:-5] for path in self.folder.glob("step=*.ckpt") if not path.is_symlink()]
        return [int(name) for name in names if name.isdecimal()]

    def _of(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step={step}.ckpt"

    def _scores(self) -> dict[int, float]:
        assert self.folder is not None
        with suppress(OSError, ValueError, AttributeError):
            stored = json.loads((self.folder / SCORES).read_text(encoding="utf-8"))
            return {int(step): float(value) for step, value in stored.items()}
        return {}

    # ------------------------------------------------------------------------------------------ before the first step

    def _clear(self) -> None:
        """What a death in mid-save has left."""
        assert self.folder is not None
        for path in self.folder.glob(f"*{ASIDE}"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _refuse_small_disk(self, trainer: L.Trainer) -> str | None:
        """Why checkpoints cannot be written here, as far as that can be told before the first step."""
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f"probe{ASIDE}"
            probe.mkdir(exist_ok=True)
            probe.rmdir()
        except OSError as error:
            return f"checkpoints cannot be written: {error}"
        size, there = estimated_bytes(trainer), self.steps()
        most = self.keep + 1 + _validates(trainer)
        need, free = size * max(1, most - len(there)), shutil.disk_usage(self.folder).free
        if need <= free:
            return None
        return (
            f"checkpoints of about {size / GIB:.2f} GiB each, {most} at a time, need {need / GIB:.2f} GiB more, and "
            f"{self.folder} has {free / GIB:.2f} GiB free: take another --runs, or lower --checkpoints.keep"
        )


def _validates(trainer: L.Trainer) -> bool:
    """Whether there are held-out rows."""
    counts = trainer.num_val_batches
    return trainer.enable_validation and (any(counts) if isinstance(counts, list) else bool(counts))


def _dry(trainer: L.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by the trainer's connectors


def _origin(trainer: L.Trainer) -> Path | None:
    """The checkpoint that the run goes on from."""
    return None if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve()


def _link(link: Path, target: Path) -> None:
    aside = link.with_name(link.name + ASIDE)
    with suppress(OSError):  # a disk without links: `last` is found by its step
        aside.unlink(missing_ok=True)
        aside.symlink_to(target.name)
        os.replace(aside, link)


def _write(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ASIDE)
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
