"""What a run gives its trainer where the config brings nothing of the kind, and what it says of an earlier part."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.trainer import Trainer

from halos_pl.checkpoints import open_checkpoint
from halos_pl.curves import Curves, before

OF_A_START = ("ckpt_path", "name", "runs")
"""Settings of one start of a run, not of the run."""


def loggers(folder: Path, resumed_from: str | None, every: int | None) -> list[Any]:
    """TensorBoard and a CSV file. Of a run that goes on, rows after its checkpoint count no more.

    Args:
        folder: of the run.
        resumed_from: its checkpoint, if the run goes on.
        every: steps between two rows of training.
    """
    step = 0 if resumed_from is None else open_checkpoint(Path(resumed_from)).step
    board = TensorBoardLogger(folder, name="", version="tensorboard", purge_step=step)
    return [board, Curves(folder / "csv", before(step, every))]


def changes(old: Any, new: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by their dotted keys; None stands for one that is not there."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {key: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in (*old, *(x for x in new if x not in old)):
        if key or name not in OF_A_START:
            found |= changes(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    return found


def keep_earlier_config(folder: Path, text: str) -> list[str]:
    """Before a run that goes on writes its config.yaml: what changed, a line each. An earlier file that says otherwise
    is kept as config-1.yaml, config-2.yaml …

    Args:
        folder: of the run.
        text: of the new config.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return []
    told = changes(yaml.safe_load(path.read_text(encoding="utf-8")) or {}, yaml.safe_load(text))
    if told:
        free = next(x for i in count(1) if not (x := folder / f"config-{i}.yaml").exists())
        path.rename(free)
    return [f"{key}: was {old}, now {new}" for key, (old, new) in told.items()]


class SavedConfig(SaveConfigCallback):
    """The resolved configuration, in the run's folder."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Not yet: a checkpoint may still be refused."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not self.already_saved and trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")
        self.already_saved = True

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        config.ckpt_path = None  # repeating the run begins at the beginning
        text = self.parser.dump(config, skip_unset=False)
        if told := keep_earlier_config(folder, text):
            print("changed since this run began:", *told, sep="\n  ")
        (folder / "config.yaml").write_text(text, encoding="utf-8")
