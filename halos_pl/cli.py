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
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.trainer import Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from halos_pl import losses
from halos_pl.callbacks import PredictionFile, ProgressBar, RunReport, Weighted, balance, describe
from halos_pl.checkpoints import CheckpointError, Checkpoints, FolderIO
from halos_pl.config_files import ConfigNotFound, resolve_configs
from halos_pl.data import AlignmentData, DataError
from halos_pl.evaluate import Evaluation
from halos_pl.fsdp import register
from halos_pl.models import ModelError
from halos_pl.module import AlignmentModule
from halos_pl.nano.shipped import refuse_mixture
from halos_pl.objective_choice import own_defaults
from halos_pl.parser_errors import explain, of_a_source
from halos_pl.quiet import quieten
from halos_pl.run_folder import ENV, RunError, RunFolder, claim, find_checkpoint
from halos_pl.run_parts import keep_earlier_config, loggers

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


class UsageError(Exception):
    """A mistake on the command line or in a config, explained in one message."""


class _Parser(LightningArgumentParser):
    def add_class_arguments(self, theclass: type, *arguments: Any, **options: Any) -> Any:
        """A source of data is a name: the parser must not open the file and take its rows for settings."""
        if theclass is AlignmentData:
            options["sub_configs"] = False
        return super().add_class_arguments(theclass, *arguments, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(message)


class _SavedConfig(SaveConfigCallback):
    """The resolved configuration, in the run's folder."""

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        config.ckpt_path = None  # repeating the run begins at the beginning
        text = self.parser.dump(config, skip_unset=False)
        if told := keep_earlier_config(folder, text):
            print("changed since this run began:", *told, sep="\n  ")
        (folder / "config.yaml").write_text(text, encoding="utf-8")


class HalosCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict`, with everything a run leaves under `runs/NAME/`."""

    def __init__(self) -> None:
        self.folder: RunFolder | None = None
        self._begins_again = False  # a run that left no checkpoint
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

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything", type=NonNegativeInt, default=0, help="Of order, y′, random weights and members."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str | None, default=None, help="Of the run's folder. Default: the objective, numbered."
        )
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
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
        path = find_checkpoint(options.ckpt_path, options.runs, options.name)
        if path is None and self.config.subcommand != "fit":
            raise RunError(f"--ckpt_path last: {Path(options.runs, options.name)} ended before its first checkpoint")
        if path is None:
            folder = Path(options.runs, options.name)
            rank_zero_only(print)(f"note: {folder} ended before its first checkpoint; it begins again")
        self._begins_again, options.ckpt_path = path is None, None if path is None else str(path)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ModuleNotFoundError, MisconfigurationException) as error:
            raise UsageError(of_a_source(str(error)) or str(error)) from error  # what constructors say of their values

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the loggers, checkpoints and report of a run, where the config does not bring its own.

        All data are read and checked first, so that a folder is made only for a run that can begin.
        """
        self._read_data()
        config = self._get(self.config_init, "trainer")
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
                callbacks.append(RunReport(folder))
                self.evaluation.folder = folder / "samples"
                if config.get("enable_checkpointing") is not False:
                    callbacks.append(self._get(self.config_init, "checkpoints"))
                if "logger" in kwargs and config.get("logger") is not False:
                    resumed = self.config[self.subcommand].ckpt_path
                    own = resumed if resumed and folder.resolve() in Path(resumed).parents else None
                    kwargs["logger"] = loggers(folder, own, config.get("log_every_n_steps"))
        kwargs["callbacks"] = callbacks
        plugins = config.get("plugins") or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), FolderIO()]
        try:
            return super().instantiate_trainer(**kwargs)
        except Exception:
            self._release_folder()
            raise

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
        goes_on = False
        if options.name is not None:
            own = Path(options.runs, options.name).resolve()
            from_itself = options.ckpt_path is not None and own in Path(options.ckpt_path).resolve().parents
            goes_on = from_itself or self._begins_again or self.subcommand == "predict"
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
        if untrained and self.model.reference_source == self.model.source:
            rank_zero_only(print)(
                "note: the reference is the policy itself, all log-ratios are 0: see --model.reference"
            )
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as end:
            if self.trainer.global_step or not isinstance(end.__context__, KeyboardInterrupt):
                raise
            self._release_folder()
            print("halos_pl: interrupted before the first step; nothing is kept", file=sys.stderr)
            raise SystemExit(130) from None
        except OSError as error:
            if error.errno not in (ENOSPC, EDQUOT):
                raise
            raise UsageError(f"{error}; once there is space, go on with --name NAME --ckpt_path last") from error
        except (ValueError, MisconfigurationException) as error:
            if self.trainer.global_step and not isinstance(error, (DataError, ModelError, CheckpointError)):
                raise
            if not self.trainer.global_step:
                self._release_folder()
            raise UsageError(str(error)) from error


def run(argv: list[str]) -> int:
    """Run a command of LightningCLI.

    Returns:
        0; 2 for a mistake of the user's, told on stderr in one message; 130 after Ctrl-C, 143 after SIGTERM.
    """
    quieten()
    register()
    try:
        sys.argv[1:] = resolve_configs(argv)  # ranks that Lightning launches parse it again
        HalosCLI()
    except SIGTERMException:
        print("halos_pl: ended by SIGTERM; go on with --name NAME --ckpt_path last", file=sys.stderr)
        return 143
    except SystemExit as end:  # Lightning turns Ctrl-C into it
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        print("halos_pl: interrupted; go on with --name NAME --ckpt_path last", file=sys.stderr)
        return 130
    except (UsageError, ConfigNotFound, RunError, DataError, ModelError, CheckpointError) as error:
        print(f"halos_pl: error: {error}", file=sys.stderr)
        return 2
    finally:
        os.environ.pop(ENV, None)
    return 0
