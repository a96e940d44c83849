"""Kahneman–Tversky Optimization: learning from single completions that are desirable or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from halos_pl.batch import CompletionLogps, View
from halos_pl.losses.checks import NaNError, check_floating, check_labels, check_positive, check_range
from halos_pl.losses.objective import LogRatioObjective, ReferenceFree, ReferencePoint, labels
from halos_pl.value import kahneman_tversky

ValueName = Literal["logistic", "log_logistic", "identity", "kahneman_tversky"]
HumanValue = Callable[[Tensor], Tensor]


def kto_loss(
    logratio: Tensor,
    desirable: Tensor,
    z0: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    value: ValueName | HumanValue = "logistic",
    alpha: float = 0.88,
    loss_aversion: float = 2.25,
) -> Tensor:
    """KTO's loss of each completion (KTO report, equations 7 and 8; the other values: ICML paper, ablations).

        loss = λ · (c − v(s·beta·(logratio − z0)))

    with s = 1 and λ = desirable_weight where desirable, s = −1 and λ = undesirable_weight elsewhere, and by `value`

        logistic            v = σ(x)          c = 1    equation 8: risk-averse in gains, risk-seeking in losses
        log_logistic        v = log σ(x)      c = 0    concave: risk-averse throughout
        identity            v = x             c = 0    risk-neutral
        kahneman_tversky    v = equation 6    c = 0    see `halos_pl.value.kahneman_tversky`
        a function          v = that          c = 0    of gains [B], in beta·nats, to values [B]

    Args:
        logratio: [B] log-probability of the completion, policy − reference, in nats.
        desirable: [B] bool.
        z0: The reference point in nats: a number, 0-d, or [B], of any float dtype. It is taken as it is: the training
            step hands in a detached one, and gradients flow through one that is not.
        beta: > 0; how strongly the policy is held to the reference.
        desirable_weight: λ of desirable completions, ≥ 0.
        undesirable_weight: λ of undesirable completions, ≥ 0.
        value: The human value function, by name or as a function.
        alpha: Exponent of `kahneman_tversky`, in (0, 1]; other values do not read it.
        loss_aversion: Weight of losses in `kahneman_tversky`, > 0; other values do not read it.

    Returns:
        [B] losses in logratio's dtype.

    Raises:
        ValueError: on unequal shapes (nothing broadcasts but a 0-d z0), dtypes or numbers other than the above.

    Example:
        >>> import torch
        >>> logratio, desirable = torch.tensor([0.0, 0.0]), torch.tensor([True, False])
        >>> kto_loss(logratio, desirable, 0.0, beta=0.1, undesirable_weight=1.5).tolist()  # policy == reference: λ/2
        [0.5, 0.75]
    """
    _check_numbers(beta, desirable_weight, undesirable_weight, value, alpha, loss_aversion)
    check_floating(logratio=logratio)
    check_labels(desirable, logratio)
    if isinstance(z0, Tensor):
        if not z0.is_floating_point() or (z0.ndim and z0.shape != logratio.shape):
            expected = f"floating point, 0-d or {list(logratio.shape)} like logratio"
            raise ValueError(f"z0 must be {expected}, got {z0.dtype} {list(z0.shape)}")
        check_floating(z0=z0)
        z0 = z0.to(logratio.dtype)
    elif isinstance(z0, bool) or not isinstance(z0, (int, float)):
        raise ValueError(f"z0 must be a number or a tensor, got {z0!r}")
    elif math.isnan(z0):
        raise NaNError("z0 must not be NaN, got nan")
    gain = beta * (logratio - z0)
    gain = torch.where(desirable, gain, -gain)
    if value == "logistic":
        loss = torch.sigmoid(-gain)  # 1 − σ(gain)
    elif value == "log_logistic":
        loss = -F.logsigmoid(gain)
    elif value == "identity":
        loss = -gain
    elif callable(value):
        loss = -value(gain)
    else:
        loss = -kahneman_tversky(gain, alpha=alpha, loss_aversion=loss_aversion)
    return torch.where(desirable, desirable_weight * loss, undesirable_weight * loss)


@dataclass(frozen=True)
class KTO(LogRatioObjective):
    """Kahneman–Tversky Optimization (see `kto_loss`).

    In a run without a reference model the step hands in logp / length as the log-ratio, and as z0 the unclamped mean of
    the same over mismatched pairs.

    Args:
        beta: How strongly the policy is held to the reference, > 0.
        desirable_weight: Weight of desirable completions, >= 0. With n_D desirable and n_U undesirable examples, keep
            desirable_weight·n_D / (undesirable_weight·n_U) between 1 and 4/3.
        undesirable_weight: Weight of undesirable completions, >= 0.
        value: Human value function: "logistic" (KTO), "log_logistic" (concave), "identity" (risk-neutral), or
            "kahneman_tversky" (prospect theory's power function).
        alpha: Exponent of "kahneman_tversky", in (0, 1].
        loss_aversion: Weight of losses in "kahneman_tversky", > 0.
        reference_point: Whether to estimate z0 from mismatched pairs (x, y′). Without, z0 = 0 and their forward passes
            are saved.
        humanline: Bounds of every token's log-ratio, [-1.0, 1.5] in HALOs; a token outside gets no gradient.
    """

    view: ClassVar[View] = "unpaired"
    formula: ClassVar[str] = "λ(1 − σ(±β(r − z0))), z0 = max(0, mean r(x, y′))"
    source: ClassVar[str] = "Ethayarajh et al. 2024"
    reference_free: ClassVar[ReferenceFree] = "mean_logp"

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    value: ValueName = "logistic"
    alpha: float = 0.88
    loss_aversion: float = 2.25
    reference_point: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_numbers(
            self.beta, self.desirable_weight, self.undesirable_weight, self.value, self.alpha, self.loss_aversion
        )
        if not isinstance(self.reference_point, bool):
            raise ValueError(f"reference_point must be true or false, got {self.reference_point!r}")

    @property
    def reference_point_from(self) -> ReferencePoint:
        return "mismatched" if self.reference_point else "none"

    @property
    def human_value(self) -> ValueName | HumanValue:
        """The value that `kto_loss` takes; override it with a function of gains for a human value of your own."""
        return self.value

    def losses(self, scores: CompletionLogps, desirable: Tensor | None, z0: Tensor | None) -> Tensor:
        if (z0 is not None) != self.reference_point:
            expected = "a tensor" if self.reference_point else "None"
            raise ValueError(f"z0 must be {expected} with reference_point={self.reference_point}, got {z0!r}")
        return kto_loss(
            scores.logratio,
            labels(self, desirable),
            0.0 if z0 is None else z0,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            value=self.human_value,
            alpha=self.alpha,
            loss_aversion=self.loss_aversion,
        )

    def rewards(self, scores: CompletionLogps) -> Tensor:
        """beta · logratio."""
        return self.beta * scores.logratio.detach()


@dataclass(frozen=True)
class APOZero(KTO):
    """APO-zero for single completions (D'Oosterlinck et al. 2024): KTO without a reference point, under the name that
    TRL's users know (`apo_zero_unpaired`).

    Args:
        beta: How strongly the policy is held to the reference, > 0.
        desirable_weight: Weight of desirable completions, >= 0.
        undesirable_weight: Weight of undesirable completions, >= 0.
        value: logistic; with another one it is KTO.
        alpha: Of no use here.
        loss_aversion: Of no use here.
        reference_point: false; with a reference point it is KTO.
        humanline: Bounds of every token's log-ratio, [-1.0, 1.5] in HALOs; a token outside gets no gradient.
    """

    formula: ClassVar[str] = "λ(1 − σ(±β r))"
    source: ClassVar[str] = "D'Oosterlinck et al. 2024"
    reference_free: ClassVar[ReferenceFree] = "refused"

    reference_point: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_point or self.value != "logistic":
            told = f"reference_point={self.reference_point!r}, value={self.value!r}"
            raise ValueError(f"APOZero has no reference point and the logistic value, got {told}: that is KTO")


def _check_numbers(
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    value: str | HumanValue,
    alpha: float,
    loss_aversion: float,
) -> None:
    check_positive("beta", beta)
    check_positive("desirable_weight", desirable_weight, or_zero=True)
    check_positive("undesirable_weight", undesirable_weight, or_zero=True)
    if not callable(value) and value not in get_args(ValueName):
        raise ValueError(f"value must be one of {', '.join(get_args(ValueName))}, got {value!r}")
    check_range("alpha", alpha, "(0, 1]")
    check_positive("loss_aversion", loss_aversion)
