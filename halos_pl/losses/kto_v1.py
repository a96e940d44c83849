"""The first report's KTO: each half of the batch is the other's reference point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halos_pl.batch import CompletionLogps, View
from halos_pl.losses.checks import check_floating, check_labels, check_positive, readable
from halos_pl.losses.objective import LogRatioObjective, labels


def kto_v1_loss(logratio: Tensor, desirable: Tensor, *, beta: float) -> Tensor:
    """The loss of each completion as in the first version of KTO (first KTO report, section 5).

        z_D, z_U = max(0, mean of logratio over desirable, undesirable completions of the batch)
        desirable      loss = 1 − σ(beta·(logratio − z_U))
        undesirable    loss = 1 − σ(beta·(z_D − logratio))

    Gradients flow through both reference points.

    Args:
        logratio: [B] log-probability of the completion, policy − reference, in nats.
        desirable: [B] bool, as many True as False.
        beta: > 0; how strongly the policy is held to the reference.

    Returns:
        [B] losses in logratio's dtype.

    Raises:
        ValueError: on unequal shapes or halves, log-ratios that are NaN or not floating point, or beta out of range.

    Example:
        >>> import torch
        >>> kto_v1_loss(torch.tensor([0.0, 0.0]), torch.tensor([True, False]), beta=0.1).tolist()
        [0.5, 0.5]
    """
    check_positive("beta", beta)
    check_floating(logratio=logratio)
    check_labels(desirable, logratio)
    if readable(desirable) and 2 * (ups := int(desirable.sum())) != desirable.numel():
        raise ValueError(f"desirable must hold equal halves, got {ups} desirable of {desirable.numel()}")
    half = logratio.numel() / 2
    z_desirable, z_undesirable = (
        torch.where(side, logratio, 0.0).sum().div(half).clamp_min(0) for side in (desirable, ~desirable)
    )
    gain = torch.where(desirable, logratio - z_undesirable, z_desirable - logratio)
    return torch.sigmoid(-beta * gain)


@dataclass(frozen=True)
class KTOv1(LogRatioObjective):
    """The first version of KTO (see `kto_v1_loss`), for comparison: `KTO` is what the paper came to. Batches hold equal
    halves of both classes (`--data.sampler stratified`); the reference points are those of a rank's micro-batch.

    Args:
        beta: How strongly the policy is held to the reference, > 0.
        humanline: Bounds of every token's log-ratio, [-1.0, 1.5] in HALOs; a token outside gets no gradient.
    """

    view: ClassVar[View] = "unpaired"
    equal_halves: ClassVar[bool] = True
    formula: ClassVar[str] = "1 − σ(±β(r − z)), z = max(0, mean r of the other half)"
    source: ClassVar[str] = "first KTO report §5"

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def losses(self, scores: CompletionLogps, desirable: Tensor | None, z0: Tensor | None = None) -> Tensor:
        return kto_v1_loss(scores.logratio, labels(self, desirable), beta=self.beta)

    def rewards(self, scores: CompletionLogps) -> Tensor:
        """beta · logratio."""
        return self.beta * scores.logratio.detach()
