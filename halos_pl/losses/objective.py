"""What every objective declares to the training step, and the checks that the losses share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from halos_pl.batch import CompletionLogps, View

Unit = Literal["example", "token"]
ReferenceFree = Literal["mean_logp", "refused"]


@dataclass(frozen=True)
class Objective(ABC):
    """A loss with its hyperparameters. Class variables tell data and scoring what it needs; subclasses are frozen
    dataclasses whose `__post_init__` raises ValueError for a field out of range."""

    view: ClassVar[View]
    """How it reads feedback."""
    unit: ClassVar[Unit] = "example"
    """What the step's mean is over: `losses` returns [B] examples or [N] scored tokens."""
    needs_reference: ClassVar[bool] = True
    """Whether it reads log-ratios to a reference model."""
    reference_free: ClassVar[ReferenceFree] = "refused"
    """Where it needs a reference and the run has none: `mean_logp` takes logp / length for the log-ratio (and for the
    reference point's, which is then not clamped); `refused` is an error at start."""

    @property
    def needs_reference_point(self) -> bool:
        """Whether the step estimates z0 from mismatched pairs (x, y′) and hands it to `losses`."""
        return False

    @abstractmethod
    def losses(self, scores: CompletionLogps, desirable: Tensor | None, z0: Tensor | None) -> Tensor:
        """Unreduced losses of a micro-batch.

        Args:
            scores: R completions; log-probabilities in nats.
            desirable: [R] bool, for the unpaired view.
            z0: The reference point, 0-d or [R], detached; None unless `needs_reference_point`.

        Returns:
            [B] losses, one an example or pair; [N], one a token, where `unit` is "token".
        """

    @abstractmethod
    def rewards(self, scores: CompletionLogps) -> Tensor | None:
        """The implied rewards [R] in nats, detached; None where the loss implies none."""


def check_positive(name: str, value: float, *, or_zero: bool = False) -> None:
    """Raises ValueError unless `value` is finite and > 0 (`or_zero`: or 0)."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
        raise ValueError(f"{name} must be a finite number {'>=' if or_zero else '>'} 0, got {value!r}")


def check_floating(**tensors: Tensor) -> None:
    """Raises ValueError unless every tensor is floating point and all have one shape."""
    (first, leader), *_ = tensors.items()
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if x.shape != leader.shape:
            raise ValueError(f"{name} must be {list(leader.shape)} like {first}, got {list(x.shape)}")
