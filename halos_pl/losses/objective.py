"""What every objective declares to the training step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from torch import Tensor

from halos_pl.batch import CompletionLogps, View

Unit = Literal["example", "token"]
ReferenceFree = Literal["mean_logp", "refused"]
ReferencePoint = Literal["none", "mismatched", "running_mean"]


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
        try:
            low, high = self.humanline
            fits = -math.inf < low < 0 < high < math.inf
            object.__setattr__(self, "humanline", (low, high))  # of a list too
        except (TypeError, ValueError):
            fits = False
        if not fits:
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


def labels(objective: Objective, desirable: Tensor | None) -> Tensor:
    """The labels, which an objective of the unpaired view cannot do without."""
    if desirable is None:
        raise ValueError(f"desirable must be [R] bool for {type(objective).__name__}, got None: it reads labels")
    return desirable
