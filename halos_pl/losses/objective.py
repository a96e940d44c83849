"""What every objective declares to the training step, and the checks that the losses share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from halos_pl.batch import CompletionLogps, View

Unit = Literal["example", "token"]
ReferenceFree = Literal["mean_logp", "refused"]
ReferencePoint = Literal["none", "mismatched", "running_mean"]


class NaNError(ValueError):
    """A log-probability or log-ratio is not a number."""


@dataclass(frozen=True)
class Objective(ABC):
    """A loss with its hyperparameters. What it declares here tells data, scoring and step what it needs, and they do no
    more than that; subclasses are frozen dataclasses whose `__post_init__` raises ValueError for a field out of range.
    """

    view: ClassVar[View]
    """How it reads feedback."""
    unit: ClassVar[Unit] = "example"
    """What the step's mean is over: `losses` returns [B] examples or [N] scored tokens."""
    needs_reference: ClassVar[bool] = True
    """Whether it reads log-ratios to a reference model; without, none is loaded."""
    reference_free: ClassVar[ReferenceFree] = "refused"
    """Where it needs a reference and the run has none: `mean_logp` takes logp / length for the log-ratio (and for the
    reference point's, which is then not clamped); `refused` is an error at start."""
    length_normalised: ClassVar[bool] = False
    """Whether it compares means over a completion's tokens instead of sums: `pair_accuracy` then does so too."""
    equal_halves: ClassVar[bool] = False
    """Whether every micro-batch must hold as many desirable as undesirable rows."""
    formula: ClassVar[str] = ""
    """The loss in one line, for the table of objectives."""
    source: ClassVar[str] = ""
    """Where it is from, likewise."""

    @property
    def reference_point_from(self) -> ReferencePoint:
        """Where the z0 that the step hands to `losses` comes from: nowhere, mismatched pairs (x, y′), which cost two
        more passes, or the running mean of all log-ratios trained on."""
        return "none"

    @property
    def control(self) -> tuple[str, str] | None:
        """What ends the prompts of desirable and of undesirable completions, unscored."""
        return None

    @property
    def needs_scores(self) -> bool:
        """Whether every row must bring its reward, the key `score`."""
        return False

    @property
    def needs_value_head(self) -> bool:
        """Whether the policy has a linear head that predicts each token's return."""
        return False

    @property
    def token_clamp(self) -> tuple[float, float] | None:
        """Bounds of every token's log-ratio, in nats."""
        return None

    def __str__(self) -> str:
        """As it would be written: what is None is left out."""
        values = {x.name: getattr(self, x.name) for x in sorted(fields(self), key=lambda x: bool(x.kw_only))}
        told = ", ".join(f"{name}={value!r}" for name, value in values.items() if value is not None)
        return f"{type(self).__name__}({told})"

    @abstractmethod
    def losses(self, scores: CompletionLogps, desirable: Tensor | None, z0: Tensor | None) -> Tensor:
        """Unreduced losses of a micro-batch.

        Args:
            scores: R completions; log-probabilities in nats.
            desirable: [R] bool; None for demonstrations.
            z0: The reference point, 0-d or [R], detached; None where `reference_point_from` is "none".

        Returns:
            [B] losses, one an example or pair; [N], one a token, where `unit` is "token".
        """

    @abstractmethod
    def rewards(self, scores: CompletionLogps) -> Tensor | None:
        """The implied rewards [R] in nats, detached; None where the loss implies none."""

    def diagnostics(self, scores: CompletionLogps, desirable: Tensor | None) -> Mapping[str, Tensor]:
        """What else to log, by a name in `metrics.FORMULAS`: values [any], whose mean is logged."""
        return {}


@dataclass(frozen=True)
class LogRatioObjective(Objective):
    """An objective of log-ratios, each token's of which may be clamped.

    Args:
        humanline: Clamp every token's log-ratio, in y′ too, to these bounds (HALOs' humanline: [-1.0, 1.5], in nats);
            a token outside gets no gradient.
    """

    humanline: tuple[float, float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.humanline is None:
            return
        low, high = self.humanline
        if not (math.isfinite(low) and math.isfinite(high) and low < 0 < high):
            raise ValueError(f"humanline must be two finite numbers, below and above 0, got {self.humanline!r}")

    @property
    def token_clamp(self) -> tuple[float, float] | None:
        return self.humanline

    def diagnostics(self, scores: CompletionLogps, desirable: Tensor | None) -> Mapping[str, Tensor]:
        if self.humanline is None or scores.token_logratio is None:
            return {}
        low, high = self.humanline
        inside = (scores.token_logratio > low) & (scores.token_logratio < high)
        return {"humanline/unclamped": inside}


def check_positive(name: str, value: float, *, or_zero: bool = False) -> None:
    """Raises ValueError unless `value` is finite and > 0 (`or_zero`: or 0)."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
        raise ValueError(f"{name} must be a finite number {'>=' if or_zero else '>'} 0, got {value!r}")


def check_floating(**tensors: Tensor) -> None:
    """Raises ValueError unless every tensor is floating point, all have one shape, and none holds a NaN (on the CPU:
    elsewhere the look would wait for the device, and the step refuses a loss that is not finite)."""
    (first, leader), *_ = tensors.items()
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if x.shape != leader.shape:
            raise ValueError(f"{name} must be {list(leader.shape)} like {first}, got {list(x.shape)}")
        if readable(x) and (bad := x.isnan()).any():
            raise NaNError(f"{name} must not be NaN, got {int(bad.sum())} NaN of {x.numel()} values")


def check_lengths(leader: Tensor, **lengths: Tensor) -> None:
    """Raises ValueError unless lengths are integer tensors of the leader's shape, at least 1 each."""
    for name, x in lengths.items():
        if x.is_floating_point() or x.dtype == torch.bool or x.shape != leader.shape:
            raise ValueError(f"{name} must be integers {list(leader.shape)}, got {x.dtype} {list(x.shape)}")
        if readable(x) and (x < 1).any():
            raise ValueError(f"{name} must be at least 1, got {int(x.min())}")


def check_labels(desirable: Tensor, leader: Tensor) -> None:
    """Raises ValueError unless the labels are bool and of the leader's shape."""
    if desirable.dtype != torch.bool or desirable.shape != leader.shape:
        expected = f"bool {list(leader.shape)} like logratio"
        raise ValueError(f"desirable must be {expected}, got {desirable.dtype} {list(desirable.shape)}")


def labels(objective: Objective, desirable: Tensor | None) -> Tensor:
    """The labels, which an objective of the unpaired view cannot do without."""
    if desirable is None:
        raise ValueError(f"desirable must be [R] bool for {type(objective).__name__}, got None: it reads labels")
    return desirable


def readable(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
