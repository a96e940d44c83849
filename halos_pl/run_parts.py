"""What a run gives its trainer where the config brings nothing of the kind: checkpoints and loggers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def checkpoints(folder: Path, *, best: bool) -> list[Callback]:
    """The last state and, with held-out rows, the best one. Checkpoints are step-named, so that none is overwritten in
    place.

    Args:
        folder: of the run.
        best: whether there are held-out rows.
    """
    where = folder / "checkpoints"
    last = ModelCheckpoint(
        where,
        filename="{step}",
        save_last="link",
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    if not best:
        return [last]
    return [last, ModelCheckpoint(where, "best-{step}", monitor="val/loss", save_on_train_epoch_end=False)]


def loggers(folder: Path) -> list[Any]:
    """A run that goes on appends to its TensorBoard folder; CSVLogger would delete its rows, so it gets a new one."""
    names = ("csv" if i == 1 else f"csv-{i}" for i in range(1, sys.maxsize))
    free = next(name for name in names if not (folder / name).exists())
    return [TensorBoardLogger(folder, name="", version="tensorboard"), CSVLogger(folder, name="", version=free)]
