"""Binary Classifier Optimization: desirable or not as a classification of rewards, around their running mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from halos_pl.batch import CompletionLogps, View
from halos_pl.losses.checks import check_positive
from halos_pl.losses.kto import kto_loss
from halos_pl.losses.objective import LogRatioObjective, ReferencePoint, labels


def bco_loss(
    logratio: Tensor,
    desirable: Tensor,
    z0: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """BCO's loss of each completion (Jung et al. 2024): a logistic regression on the implied reward.

        loss = −λ·log σ(s·beta·(logratio − z0))

    with s = 1 and λ = desirable_weight where desirable, s = −1 and λ = undesirable_weight elsewhere. The paper's reward
    shift δ, half the sum of the two class means, is beta·z0 where both classes are equally frequent. This is `kto_loss`
    with the concave value log σ; what differs is where z0 comes from. The paper's density-ratio weights for prompts
    that differ between the classes are not in it.

    Args:
        logratio: [B] log-probability of the completion, policy − reference, in nats.
        desirable: [B] bool.
        z0: Running mean of log-ratios in nats: a number, 0-d, or [B]; taken as it is, gradient included.
        beta: > 0; how strongly the policy is held to the reference.
        desirable_weight: λ of desirable completions, ≥ 0.
        undesirable_weight: λ of undesirable completions, ≥ 0.

    Returns:
        [B] losses in logratio's dtype.

    Raises:
        ValueError: as `kto_loss`.

    Example:
        >>> import torch
        >>> bco_loss(torch.tensor([2.0, 2.0]), torch.tensor([True, False]), 2.0, beta=0.1).exp().tolist()
        [2.0, 2.0]
    """
    return kto_loss(
        logratio,
        desirable,
        z0,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        value="log_logistic",
    )


@dataclass(frozen=True)
class BCO(LogRatioObjective):
    """Binary Classifier Optimization (see `bco_loss`). The reference point is the mean log-ratio of all completions
    trained on so far (as in TRL), over all ranks; it is part of a checkpoint. Under `--data.sampler stratified` it is
    the paper's, the mean of the two class means.

    Args:
        beta: How strongly the policy is held to the reference, > 0.
        desirable_weight: Weight of desirable completions, >= 0.
        undesirable_weight: Weight of undesirable completions, >= 0.
        humanline: Bounds of every token's log-ratio, [-1.0, 1.5] in HALOs; a token outside gets no gradient.
    """

    view: ClassVar[View] = "unpaired"
    formula: ClassVar[str] = "−λ log σ(±β(r − z0)), z0 = running mean of r"
    source: ClassVar[str] = "Jung et al. 2024"

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)
        check_positive("desirable_weight", self.desirable_weight, or_zero=True)
        check_positive("undesirable_weight", self.undesirable_weight, or_zero=True)

    @property
    def reference_point_from(self) -> ReferencePoint:
        return "running_mean"

    def losses(self, scores: CompletionLogps, desirable: Tensor | None, z0: Tensor | None) -> Tensor:
        if z0 is None:
            raise ValueError("z0 must be a tensor for BCO, got None")
        return bco_loss(
            scores.logratio,
            labels(self, desirable),
            z0,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )

    def rewards(self, scores: CompletionLogps) -> Tensor:
        """beta · logratio."""
        return self.beta * scores.logratio.detach()
