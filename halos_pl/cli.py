"""The command line: LightningCLI over AlignmentModule and AlignmentData, a run folder, and errors in one line."""

from __future__ import annotations

import os
import sys
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.trainer import Trainer
from lightning.pytorch.utilities import rank_zero_only

from halos_pl import losses
from halos_pl.callbacks import PredictionFile, ProgressBar, RunReport, Weighted, balance, describe
from halos_pl.checkpoints import CheckpointError, Checkpoints, FolderIO
from halos_pl.config_files import ConfigNotFound, resolve_configs
from halos_pl.data import AlignmentData, DataError
from halos_pl.evaluate import Evaluation
from halos_pl.fsdp import refuse_others, register
from halos_pl.guards import Guards
from halos_pl.memory import is_out_of_memory
from halos_pl.models import ModelError
from halos_pl.module import AlignmentModule
from halos_pl.nano.shipped import refuse_mixture
from halos_pl.objective_choice import own_defaults
from halos_pl.parser_errors import UsageError, explain, of_a_source
from halos_pl.preemption import Preemption
from halos_pl.quiet import quieten
from halos_pl.run_folder import AUTO, ENV, RunError, RunFolder, claim, find_checkpoint
from halos_pl.run_parts import SavedConfig, loggers
from halos_pl.run_record import RunRecord
from halos_pl.signals import Preempted, Signals, end_children

TRAINER_DEFAULTS = {
    "num_sanity_val_steps": -1,  # all held-out rows: the state before training
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "max_epochs": 1,
    "deterministic": "warn",
    "enable_model_summary": False,  # RunReport says what is trained
}


_CLASSES = {
    "model.objective": {x.__name__: x for x in losses.OBJECTIVES},
    "model.optimizer": {
        x.__name__: x for x in vars(torch.optim).values() if isinstance(x, type) and x is not torch.optim.Optimizer
    },
}


class _Parser(LightningArgumentParser):
    def add_class_arguments(self, theclass: type, *arguments: Any, **options: Any) -> Any:
        """A source of data is a name: the parser must not open the file and take its rows for settings."""
        if theclass is AlignmentData:
            options["sub_configs"] = False
        return super().add_class_arguments(theclass, *arguments, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(message)


class HalosCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict`, with everything a run leaves under `runs/NAME/`."""

    def __init__(self, signals: Signals | None = None) -> None:
        self.folder: RunFolder | None = None
        self.signals, self.goes_on = signals, False
        super().__init__(
            AlignmentModule,
            AlignmentData,
            save_config_callback=SavedConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=_Parser,
            parser_kwargs={"prog": "python -m halos_pl", "allow_abbrev": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything", type=NonNegativeInt, default=0, help="Of order, y′, random weights and members."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str | None, default=None, help="Of the run's folder. Default: the objective, numbered."
        )
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_lightning_class_args(Guards, "guards")  # first: it is to know that samples are drawn
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_class_arguments(Checkpoints, "checkpoints")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.init_seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        sys.argv[1:] = own_defaults(sys.argv[1:])
        for option in ("--data.train", "--data.validation", "--data.test"):
            if sum(word.partition("=")[0] == option for word in sys.argv) > 1:
                several = f"several sources are a list: {option} '[a.jsonl, b.jsonl]'"
                rank_zero_only(print)(f"note: {option} is given twice, and the last one counts; {several}")
        try:
            super().parse_arguments(parser, args)
        except UsageError as error:
            command = sys.argv[1] if len(sys.argv) > 1 else ""
            if command not in self._subcommand_parsers:
                raise
            raise UsageError(explain(str(error), self._subcommand_parsers[command], _CLASSES)) from None

    def _parse_ckpt_path(self) -> None:
        """Lightning would let hyper-parameters stored in the checkpoint override the command line; none are stored."""
        options = self.config[self.config.subcommand]
        if options.ckpt_path is None:
            return
        self.goes_on = options.ckpt_path == AUTO
        if self.goes_on and self.config.subcommand != "fit":
            raise RunError("--ckpt_path auto goes on with a training, or begins it; here it is `last` or a file")
        path = find_checkpoint(options.ckpt_path, options.runs, options.name)
        if path is None and not self.goes_on:
            told = f"{Path(options.runs, options.name)} ended before its first checkpoint"
            if self.config.subcommand != "fit":
                raise RunError(f"--ckpt_path last: {told}")
            rank_zero_only(print)(f"note: {told}; it begins again")
        self.goes_on |= path is None
        options.ckpt_path = path and str(path)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ModuleNotFoundError, MisconfigurationException) as error:
            raise UsageError(of_a_source(str(error)) or str(error)) from error  # what constructors say of their values

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the loggers, checkpoints and report of a run, where the config does not bring its own.

        All data are read and checked first, so that a folder is made only for a run that can begin.
        """
        config = self._get(self.config_init, "trainer")
        refuse_others(config.get("strategy"))
        self._read_data()
        if config.get("default_root_dir") is not None:
            raise UsageError("--trainer.default_root_dir: runs go to the folder of --runs")
        if config.get("overfit_batches"):
            raise UsageError("--trainer.overfit_batches: to train on the same few rows, --data.train.limit ROWS")
        own = config.get("callbacks") or []
        callbacks: list[Callback] = own if isinstance(own, list) else [own]
        plain = config.get("fast_dev_run") or config.get("barebones")
        if config.get("enable_progress_bar") is not False and not config.get("barebones"):
            callbacks.append(ProgressBar())
        if self.subcommand != "fit" or plain:
            self.save_config_callback = None
        if config.get("logger") in (None, True):
            kwargs["logger"] = False
        if self.subcommand in ("fit", "predict") and not plain:
            folder = self._claim_folder()
            kwargs["default_root_dir"] = str(folder)
            if self.subcommand == "predict":
                callbacks.append(PredictionFile(folder / "predictions.jsonl"))
            else:
                self._keep_bad_rows(folder)
                callbacks += [RunRecord(folder), RunReport(folder)]
                self.evaluation.folder = folder / "samples"
                if config.get("enable_checkpointing") is not False:
                    callbacks.append(self._get(self.config_init, "checkpoints"))
                if "logger" in kwargs and config.get("logger") is not False:
                    resumed = self.config[self.subcommand].ckpt_path
                    own = resumed if resumed and folder.resolve() in Path(resumed).parents else None
                    kwargs["logger"] = loggers(folder, own, config.get("log_every_n_steps"))
        kwargs["callbacks"] = [Preemption(self.signals), *callbacks]
        plugins = config.get("plugins") or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), FolderIO()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except BaseException:
            self._release_folder()
            raise
        self._get(self.config_init, "guards").give_time(trainer.strategy)
        return trainer

    @property
    def evaluation(self) -> Evaluation:
        found = self._get(self.config_init, "evaluation")
        assert isinstance(found, Evaluation)
        return found

    def _read_data(self) -> None:
        if self.subcommand in ("fit", "validate"):
            options, stages = self.config[self.subcommand], ("validation", "train")[: 1 + (self.subcommand == "fit")]
            read = {f"data.{stage}": [x.name for x in self.datamodule.sources[stage]] for stage in stages}
            refuse_mixture(read | {key: options[key] for key in ("evaluation.prompts", "evaluation.text")})
        self.datamodule.needs = self.model.data_needs
        self.datamodule.setup(self.subcommand)
        for stage, dataset in self.datamodule.datasets.items():
            rank_zero_only(print)(f"{stage}: {dataset.report}")
        if self.subcommand == "fit" and isinstance(self.model.objective, Weighted):
            stratified = self.datamodule.sampler == "stratified"  # shows as many of both
            labels = np.array([True, False]) if stratified else self.datamodule.datasets["train"].labels
            rank_zero_only(print)(balance(self.model.objective, labels))
        if self.subcommand in ("fit", "validate"):
            self.evaluation.read(self.datamodule)
        elif self.evaluation.active:
            rank_zero_only(print)(f"note: `{self.subcommand}` samples nothing: evaluation belongs to fit and validate")

    def _claim_folder(self) -> Path:
        """A new folder; the same one for a run that goes on from its own checkpoint, and for predictions beside it."""
        options = self.config[self.subcommand]
        goes_on = self.goes_on
        if options.name is not None and not goes_on:
            own = Path(options.runs, options.name).resolve()
            from_itself = options.ckpt_path is not None and own in Path(options.ckpt_path).resolve().parents
            goes_on = from_itself or self.subcommand == "predict"
        default = type(self.model.objective).__name__.lower()
        self.folder = claim(options.runs, options.name, default, goes_on=goes_on)
        return self.folder.path

    def _keep_bad_rows(self, folder: Path) -> None:
        """What `--data.on_bad_row skip` left out, in the run's folder."""
        file = folder / "bad_rows.jsonl"
        if left := rank_zero_only(self.datamodule.save_bad_rows)(file):
            print(f"{left:,} bad rows are left out; they lie in {file}")

    def _release_folder(self) -> None:
        if self.folder is not None:
            self.folder.release()

    def after_fit(self) -> None:
        if self.config[self.subcommand].trainer.get("fast_dev_run"):
            told = "dry run: every row was read, a step and a validation ran, nothing was written"
            rank_zero_only(print)(f"\n{describe(self.model)}\n{told}")

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave no folder of a run that never began; errors of that time are the user's, told in one message."""
        untrained = subcommand != "fit" and self.config[subcommand].ckpt_path is None
        model, begins = self.model, self.model.lora is not None and self.model.lora.adapter is not None
        same = model.reference_source is model.source if begins else model.reference_source == model.source
        if untrained and same:
            rank_zero_only(print)(
                "note: the reference is the policy itself, all log-ratios are 0: see --model.reference"
            )
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            end_children(getattr(self.trainer.strategy.launcher, "procs", ()), patience=10)
            began = self.trainer.global_step
            if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
                raise UsageError(f"{error}; once there is space, go on with --name NAME --ckpt_path last") from error
            if not began:
                self._release_folder()
            if isinstance(error, Preempted) and not began and self.folder is not None and self.folder.claimed:
                raise Preempted(error.signum, " before the first step; nothing is kept") from None
            told = isinstance(error, (DataError, ModelError, CheckpointError)) or is_out_of_memory(error)
            if told or (not began and isinstance(error, (ValueError, MisconfigurationException))):
                raise UsageError(str(error)) from error
            raise


def run(argv: list[str]) -> int:
    """Run a command of LightningCLI.

    Returns:
        0; 2 for a mistake of the user's, told on stderr in one message; 128 + its number after a signal: 130 after
        Ctrl-C, 138 after SIGUSR1, 143 after SIGTERM. A process that a watchdog ends has status 75.
    """
    quieten()
    register()
    try:
        with Signals() as signals:
            sys.argv[1:] = resolve_configs(argv)  # ranks that Lightning launches parse it again
            HalosCLI(signals)
    except Preempted as end:
        rank_zero_only(print)(f"halos_pl: {end}", file=sys.stderr)
        return end.status
    except (UsageError, ConfigNotFound, RunError, DataError, ModelError, CheckpointError) as error:
        print(f"halos_pl: error: {error}", file=sys.stderr)
        return 2
    finally:
        os.environ.pop(ENV, None)
    return 0
