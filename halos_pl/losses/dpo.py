"""Direct Preference Optimization: learning from pairs of which one completion was preferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from halos_pl.batch import CompletionLogps, View
from halos_pl.losses.checks import check_floating, check_positive, check_range
from halos_pl.losses.objective import LogRatioObjective


def dpo_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float) -> Tensor:
    """DPO's loss of each preference pair (KTO report, equation 4).

        loss = −log σ(beta·(chosen_logratio − rejected_logratio))

    Args:
        chosen_logratio: [B] log-probability of the preferred completion, policy − reference, in nats.
        rejected_logratio: [B] of the other one.
        beta: > 0; how strongly the policy is held to the reference.

    Returns:
        [B] losses in the inputs' dtype.

    Raises:
        ValueError: on unequal shapes, inputs that are NaN or not floating point, or beta out of range.

    Example:
        >>> import torch
        >>> dpo_loss(torch.tensor([0.0]), torch.tensor([0.0]), beta=0.1).exp()  # policy == reference: log 2
        tensor([2.])
    """
    return cdpo_loss(chosen_logratio, rejected_logratio, beta=beta, epsilon=0.0)


def cdpo_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float, epsilon: float) -> Tensor:
    """Conservative DPO: a share epsilon of the preferences is taken to be the wrong way round (Mitchell 2023).

        Δ = chosen_logratio − rejected_logratio
        loss = −(1 − epsilon)·log σ(beta·Δ) − epsilon·log σ(−beta·Δ)

    Its minimum lies where σ(beta·Δ) = 1 − epsilon, so that no pair is pushed apart for ever.

    Args:
        chosen_logratio: [B] log-probability of the preferred completion, policy − reference, in nats.
        rejected_logratio: [B] of the other one.
        beta: > 0; how strongly the policy is held to the reference.
        epsilon: In [0, 0.5); 0 is DPO.

    Returns:
        [B] losses in the inputs' dtype.

    Raises:
        ValueError: on unequal shapes, inputs that are NaN or not floating point, or a number out of range.

    Example:
        >>> import torch
        >>> cdpo_loss(torch.tensor([0.0]), torch.tensor([0.0]), beta=0.1, epsilon=0.2).exp()
        tensor([2.])
    """
    check_positive("beta", beta)
    check_range("epsilon", epsilon, "[0, 0.5)")
    check_floating(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    gain = beta * (chosen_logratio - rejected_logratio)
    if not epsilon:
        return -F.logsigmoid(gain)
    return -(1 - epsilon) * F.logsigmoid(gain) - epsilon * F.logsigmoid(-gain)


@dataclass(frozen=True)
class DPO(LogRatioObjective):
    """Direct Preference Optimization (see `dpo_loss`).

    Args:
        beta: How strongly the policy is held to the reference, > 0.
        humanline: Bounds of every token's log-ratio, [-1.0, 1.5] in HALOs; a token outside gets no gradient.
    """

    view: ClassVar[View] = "paired"
    formula: ClassVar[str] = "−log σ(β(r_w − r_l))"
    source: ClassVar[str] = "Rafailov et al. 2023"

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def losses(self, scores: CompletionLogps, desirable: Tensor | None = None, z0: Tensor | None = None) -> Tensor:
        chosen, rejected = scores.pairs()
        return dpo_loss(chosen.logratio, rejected.logratio, beta=self.beta)

    def rewards(self, scores: CompletionLogps) -> Tensor:
        """beta · logratio, chosen rows first."""
        return self.beta * scores.logratio.detach()


@dataclass(frozen=True)
class CDPO(DPO):
    """Conservative DPO (see `cdpo_loss`).

    Args:
        beta: How strongly the policy is held to the reference, > 0.
        epsilon: Share of the preferences that are the wrong way round, in [0, 0.5).
        humanline: Bounds of every token's log-ratio, [-1.0, 1.5] in HALOs; a token outside gets no gradient.
    """

    formula: ClassVar[str] = "−(1−ε) log σ(βΔ) − ε log σ(−βΔ), Δ = r_w − r_l"
    source: ClassVar[str] = "Mitchell 2023"

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("epsilon", self.epsilon, "[0, 0.5)")

    def losses(self, scores: CompletionLogps, desirable: Tensor | None = None, z0: Tensor | None = None) -> Tensor:
        chosen, rejected = scores.pairs()
        return cdpo_loss(chosen.logratio, rejected.logratio, beta=self.beta, epsilon=self.epsilon)
