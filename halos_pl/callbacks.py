"""What a run leaves: a progress bar that shows the objective at work, the exported policy, and a closing table."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from halos_pl.data import AlignmentData
from halos_pl.evaluate import Evaluation
from halos_pl.handover import hand_over, whole_weights
from halos_pl.model_card import model_card
from halos_pl.models import ModelError
from halos_pl.module import AlignmentModule
from halos_pl.scoring import SharedReference

Metrics = dict[str, float]


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with loss, KL and reward margin of the last logged step."""

    shown = ("loss", "kl", "rewards/margin", "tokens_per_second")

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else 50)
        self._read: tuple[int, dict[str, Any]] = (-1, {})

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Read off the device once a logged step, not once a refresh."""
        step = (trainer.global_step - 1) // max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if step != self._read[0]:
            names = {f"train/{name}": name.split("/")[-1].replace("tokens_per_second", "tok/s") for name in self.shown}
            logged = {names[key]: value for key, value in trainer.callback_metrics.items() if key in names}
            self._read = step, {name: f"{float(value):.4g}" for name, value in logged.items()}
        return self._read[1]


class RunReport(L.Callback):
    """Measures the held-out rows before and after, exports the policy, and says where everything lies.

    Args:
        folder: of the run; the policy goes to `policy/` below it.
        console: where the closing table goes.
    """

    def __init__(self, folder: Path, console: Console | None = None) -> None:
        self.folder = folder
        self.console = console or Console(highlight=False)
        self.before: Metrics = {}
        self.after: Metrics = {}
        self.measured_at: int | None = None  # global step of the last validation
        self.trained = False  # whether there is something to export

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The sanity check runs over all held-out rows (`num_sanity_val_steps: -1`): that is the state before."""
        if trainer.num_sanity_val_batches != trainer.num_val_batches or self.before:  # it goes on from a checkpoint
            return
        self.before = _held_out(trainer)
        for logger in trainer.loggers:
            logger.log_metrics(self.before, step=0)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, AlignmentModule)
        self._print(describe(pl_module))

    def on_train_batch_end(self, *_: Any) -> None:
        self.trained = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.measured_at, self.after = trainer.global_step, _held_out(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where training ended between two validations, measure what is exported."""
        self.trained = self.trained or self._died_late(trainer)
        if not self.trained:
            return
        if trainer.enable_validation and self.measured_at != trainer.global_step:
            loop = trainer.fit_loop.epoch_loop
            loop._batches_that_stepped = trainer.global_step  # by which Lightning numbers the row
            loop.val_loop.restarting = False
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True
        if not trainer.enable_validation:
            self.after = {}

    def _died_late(self, trainer: L.Trainer) -> bool:
        """Whether the run goes on from its last step, of which an earlier start of it has exported nothing."""
        module = trainer.lightning_module
        assert isinstance(module, AlignmentModule)
        quantized = module.lora is not None and module.lora.quantize != "none"  # whose adapter alone is exported
        checkpoint, export = (
            Path(trainer.ckpt_path or "").resolve(),
            self.folder / ("adapter" if quantized else "policy"),
        )
        own = trainer.global_step > 0 and self.folder.resolve() in checkpoint.parents
        late = own and not (
            export.is_dir() and export.stat().st_mtime >= (checkpoint / "manifest.json").stat().st_mtime
        )
        return bool(trainer.strategy.broadcast(late))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.trained and self._died_late(trainer):  # no step was left, so Lightning has left this out
            progress = trainer.fit_loop.epoch_progress.current
            progress.completed = progress.ready
            self.on_train_end(trainer, pl_module)
            pl_module.on_train_end()
        if self.trained:
            assert isinstance(pl_module, AlignmentModule)
            weights = whole_weights(pl_module)  # all ranks take part
            self._write(trainer, pl_module, weights)
            trainer.strategy.barrier("halos_pl.export")
        elif step := trainer.global_step:
            self._print(f"this run had ended at step {step}: raise --trainer.max_epochs or --trainer.max_steps")
        else:
            self._print("nothing was trained, so nothing is exported")

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "after": self.after, "measured_at": self.measured_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]
        self.after, self.measured_at = state_dict.get("after", {}), state_dict.get("measured_at")

    @rank_zero_only
    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    @rank_zero_only
    def _write(
        self, trainer: L.Trainer, pl_module: L.LightningModule, weights: dict[str, Tensor] | None = None
    ) -> None:
        data = getattr(trainer, "datamodule", None)
        assert isinstance(pl_module, AlignmentModule)
        assert isinstance(data, AlignmentData)
        card = model_card(pl_module, data, self.before, self.after, steps=trainer.global_step)
        places = hand_over(pl_module, data, self.folder, card, weights)
        evaluation = next((x for x in _all(trainer) if isinstance(x, Evaluation)), None)
        if self.after:
            self.console.print(self.table())
            if evaluation is not None and (samples := evaluation.table()) is not None:
                self.console.print(samples)
        else:
            self._print("no held-out rows: --data.validation FILE shows how they fare before and after")
        if trainer.checkpoint_callback is not None:
            places["checkpoints"] = str(self.folder / "checkpoints")
        if logs := [str(logger.log_dir) for logger in trainer.loggers if getattr(logger, "log_dir", None)]:
            places["curves"] = ", ".join(logs)
        if evaluation is not None and evaluation.after:
            places["samples"] = str(self.folder / "samples")
        places["settings"] = str(self.folder / "config.yaml")
        self._print("\n".join(f"{name:12} {place}" for name, place in places.items()))

    def table(self) -> Table:
        """Before and after, what was sampled first; a share with its interval stands on one line."""
        table = Table(title="held out", title_justify="left")
        table.add_column("metric")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        names = sorted(self.after, key=lambda name: not name.startswith(("val/samples/", "val/text/")))
        for name in names:
            if not name.endswith(("_low", "_high")):
                table.add_row(_label(name), _value(self.before, name), _value(self.after, name))
        return table


class PredictionFile(BasePredictionWriter):
    """`predict` writes one JSON line a completion: where it came from and its scores, in the order of the data."""

    def __init__(self, path: Path) -> None:
        super().__init__(write_interval="epoch")
        self.path = path

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "predict" and trainer.world_size > 1:
            raise ModelError("predict writes one file in the order of the data: run it with --trainer.devices 1")

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        data = getattr(trainer, "datamodule", None)
        assert isinstance(data, AlignmentData)
        rows = (item.examples for item in data.datasets["predict"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", encoding="utf-8") as file:
            for scores in predictions:
                for record in _by_example(scores, next(iter(scores.values())).shape[0], rows):
                    file.write(json.dumps(record) + "\n")
        Console(highlight=False).print(f"\npredictions  {self.path}", soft_wrap=True)


def _by_example(scores: dict[str, Tensor], count: int, rows: Any) -> list[dict[str, Any]]:
    """Undo the layout of a batch: row b of a pair batch is chosen, row B + b rejected."""
    first = next(rows)
    examples = [first, *(next(rows) for _ in range(count // len(first) - 1))]
    records = []
    for b, members in enumerate(examples):
        for m, example in enumerate(members):
            place = m * len(examples) + b
            records.append(
                {"file": example.origin.file, "row": example.origin.row, "desirable": example.desirable}
                | {name: value[place].item() for name, value in scores.items()}
            )
    return records


def describe(module: AlignmentModule) -> str:
    """One line a model: what is trained, and against what."""
    assert module.policy is not None
    trained = sum(p.numel() for p in module.policy.parameters() if p.requires_grad)
    source = module.source.name or "random weights"
    lines = [f"policy: {type(module.policy.lm).__name__}, {trained:,} trained parameters, from {source}"]
    if module.lora is not None:
        share = trained / module.policy.lm.num_parameters()
        lines.append(f"adapters: {100 * share:.3g} % of all parameters are trained, {module.lora}")
    if isinstance(module.reference, SharedReference):
        lines.append(f"reference: {module.reference}")
    elif module.reference_source is not None:
        lines.append(f"reference: {module.reference_source.name or 'random weights'}, frozen")
    return "\n".join([*lines, f"objective: {module.objective}"])


@runtime_checkable
class Weighted(Protocol):
    """An objective whose two classes have weights."""

    @property
    def desirable_weight(self) -> float: ...

    @property
    def undesirable_weight(self) -> float: ...


def balance(objective: Weighted, desirable: NDArray[np.bool_]) -> str:
    """How much the two classes weigh; outside the range that the KTO paper advises, the weight that leads there.

    Args:
        objective: its weights.
        desirable: [rows] labels.
    """
    weights = {"desirable": objective.desirable_weight, "undesirable": objective.undesirable_weight}
    up = weights["desirable"] * int(desirable.sum())
    down = weights["undesirable"] * int((~desirable).sum())
    if not up or not down:
        return "balance: one class has no weight"
    ratio = up / down
    told = f"desirable rows weigh {ratio:.2f} times the undesirable ones"
    if 0.99 <= ratio <= 1.01 * 4 / 3:
        return f"balance: {told}"
    lighter, other = ("desirable", "undesirable") if ratio < 1 else ("undesirable", "desirable")
    low, high = (1 / ratio, 4 / 3 / ratio) if ratio < 1 else (ratio * 3 / 4, ratio)
    least, most = _rounded(weights[lighter] * low, up=True), _rounded(weights[lighter] * high, up=False)
    return (
        f"warning: {told} (λ_D n_D / (λ_U n_U)); the paper advises 1 to 4/3: --model.objective.{lighter}_weight "
        f"{least} to {most} (with {other}_weight {weights[other]:g})"
        + ("; below 1 is a choice for preventing harm" if ratio < 1 else "")
    )


def _rounded(x: float, *, up: bool) -> str:
    """Three digits, never past x in the wrong direction."""
    unit = 10.0 ** (math.floor(math.log10(x)) - 2)
    digits = math.ceil(x / unit - 1e-9) if up else math.floor(x / unit + 1e-9)
    return f"{digits * unit:.6g}"


def _all(trainer: L.Trainer) -> list[L.Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # set by the trainer's connectors


def _label(name: str) -> str:
    return name.removeprefix("val/") + (" (90 %)" if name == "val/samples/verified" else "")


def _value(metrics: Metrics, name: str) -> str:
    if name not in metrics:
        return ""
    if name + "_low" in metrics:
        share, low, high = (100 * metrics[name + end] for end in ("", "_low", "_high"))
        return f"{share:.1f} % ({low:.1f} – {high:.1f})"
    return f"{metrics[name]:.4g}"


def _held_out(trainer: L.Trainer) -> Metrics:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
