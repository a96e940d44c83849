"""The command line: LightningCLI over AlignmentModule and AlignmentData, a run folder, and errors in one line."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.trainer import Trainer

from halos_pl import losses
from halos_pl.callbacks import LastCheckpoint, PredictionFile, ProgressBar, RunReport
from halos_pl.config_files import ConfigNotFound, resolve_configs
from halos_pl.data import AlignmentData, DataError
from halos_pl.losses import Objective
from halos_pl.models import ModelError
from halos_pl.module import AlignmentModule
from halos_pl.parser_errors import explain

TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,  # AlignmentData cuts its order over the ranks itself
    "num_sanity_val_steps": -1,  # all held-out rows: the state before training
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "max_epochs": 1,
    "deterministic": "warn",
    "enable_model_summary": False,  # RunReport says what is trained
}


_CLASSES = {
    f"model.{key}": {x.__name__: x for x in vars(module).values() if isinstance(x, type) and x is not base}
    for key, module, base in (("objective", losses, Objective), ("optimizer", torch.optim, torch.optim.Optimizer))
}


class UsageError(Exception):
    """A mistake on the command line or in a config, explained in one message."""


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(message)


class _SavedConfig(SaveConfigCallback):
    """The resolved configuration, in the run's folder."""

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(folder / "config.yaml"), skip_unset=False, overwrite=True)


class HalosCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict`, with everything a run leaves under `runs/NAME/`."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.folder_is_new = False
        super().__init__(
            AlignmentModule,
            AlignmentData,
            save_config_callback=_SavedConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=_Parser,
            parser_kwargs={"prog": "python -m halos_pl", "allow_abbrev": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str | None, default=None, help="Of the run's folder. Default: the objective, numbered."
        )
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.init_seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except UsageError as error:
            command = sys.argv[1] if len(sys.argv) > 1 else ""
            if command not in self._subcommand_parsers:
                raise
            raise UsageError(explain(str(error), self._subcommand_parsers[command], _CLASSES)) from None

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:  # what our constructors say of values that they refuse
            raise UsageError(str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the loggers, checkpoints and report of a run, where the config does not bring its own."""
        checkpoint = self._get(self.config, "ckpt_path")
        if checkpoint and checkpoint not in ("last", "best") and not Path(checkpoint).exists():
            raise UsageError(f"--ckpt_path: no checkpoint {checkpoint!r}; give a file, or `last`")
        config = self._get(self.config_init, "trainer")
        writes = self.subcommand in ("fit", "predict") and not config.get("fast_dev_run")
        callbacks: list[Callback] = [] if config.get("enable_progress_bar") is False else [ProgressBar()]
        if writes:
            folder = self._run_folder()
            kwargs["default_root_dir"] = str(folder)
            if self.subcommand == "predict":
                callbacks.append(PredictionFile(folder / "predictions.jsonl"))
            else:
                callbacks.append(RunReport(folder))
                if config.get("enable_checkpointing") is not False:
                    callbacks += self._checkpoints(folder)
        if self.subcommand != "fit":
            self.save_config_callback = None
        if config.get("logger") in (None, True):
            kwargs["logger"] = _loggers(folder) if writes and self.subcommand == "fit" else False
        kwargs["callbacks"] = [*(config.get("callbacks") or []), *callbacks]
        return super().instantiate_trainer(**kwargs)

    def _checkpoints(self, folder: Path) -> list[Callback]:
        """The last state and, with held-out rows, the best one. Checkpoints are step-named, so that none is overwritten
        in place."""
        where = folder / "checkpoints"
        last = LastCheckpoint(where, filename="{step}", save_last="link", enable_version_counter=False)
        if self.datamodule.sources["validation"][0] is None:
            return [last]
        return [last, ModelCheckpoint(where, "best-{step}", monitor="val/loss", save_on_train_epoch_end=False)]

    def _run_folder(self) -> Path:
        """runs/NAME. A name in use is refused, unless the run goes on from its own checkpoint; without a name the
        first free one is taken. Nothing is created before the data have been read."""
        runs, name = Path(self._get(self.config, "runs")), self._get(self.config, "name")
        if name is None:
            base = type(self.model.objective).__name__.lower()
            names = (base if i == 1 else f"{base}-{i}" for i in range(1, sys.maxsize))
            name = next(x for x in names if not (runs / x).exists())
        folder = runs / name
        used = folder.is_dir() and any(folder.iterdir())
        checkpoint = self._get(self.config, "ckpt_path")
        if used and self.subcommand == "fit" and not checkpoint:
            raise UsageError(
                f"--name: {folder} holds an earlier run; go on with it (--ckpt_path last), or take another name"
            )
        if checkpoint == "last" and not (folder / "checkpoints" / "last.ckpt").exists():
            raise UsageError(f"--ckpt_path last: {folder} holds no checkpoint; name the run that goes on with --name")
        self.folder, self.folder_is_new = folder, not used
        return folder

    def _run_subcommand(self, subcommand: str) -> None:
        """Read and check all data before a model is loaded or a folder is made; leave no folder of a run that never
        began."""
        self.datamodule.needs = self.model.data_needs
        try:
            self.datamodule.setup(subcommand)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if self.trainer.is_global_zero:
            for stage, dataset in self.datamodule.datasets.items():
                print(f"{stage}: {dataset.report}")
        try:
            super()._run_subcommand(subcommand)
        except (DataError, ModelError):
            if self.folder is not None and self.folder_is_new and not self.trainer.global_step:
                shutil.rmtree(self.folder, ignore_errors=True)
                with suppress(OSError):  # not empty: other runs
                    self.folder.parent.rmdir()
            raise


def run(argv: list[str]) -> int:
    """Run a command of LightningCLI; status 2 is a mistake of the user's, told on stderr in one message."""
    _quieten()
    try:
        sys.argv[1:] = resolve_configs(argv)  # ranks that Lightning launches parse it again
        HalosCLI()
    except (UsageError, ConfigNotFound, DataError, ModelError) as error:
        print(f"halos_pl: error: {error}", file=sys.stderr)
        return 2
    return 0


def _quieten() -> None:
    """Silence what other libraries say about things that are as they should be."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of calls that LightningCLI makes
    for message in (
        ".*does not have many workers.*",
        ".*in eval mode at the start of training.*",  # the reference
        ".*isinstance.treespec, LeafSpec.*",
        "Total length of .list. across ranks is zero",  # no held-out rows
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    transformers.utils.logging.disable_progress_bar()


def _loggers(folder: Path) -> list[Any]:
    """A run that goes on appends to its TensorBoard folder; CSVLogger would delete its rows, so it gets a new one."""
    names = ("csv" if i == 1 else f"csv-{i}" for i in range(1, sys.maxsize))
    free = next(name for name in names if not (folder / name).exists())
    return [TensorBoardLogger(folder, name="", version="tensorboard"), CSVLogger(folder, name="", version=free)]
