"""Direct Preference Optimization: learning from pairs of which one completion was preferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from halos_pl.batch import CompletionLogps, View
from halos_pl.losses.objective import Objective, check_floating, check_positive


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
        ValueError: on unequal shapes, inputs that are not floating point, or beta out of range.

    Example:
        >>> import torch
        >>> dpo_loss(torch.tensor([0.0]), torch.tensor([0.0]), beta=0.1).exp()  # policy == reference: log 2
        tensor([2.])
    """
    check_positive("beta", beta)
    check_floating(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    return -F.logsigmoid(beta * (chosen_logratio - rejected_logratio))


@dataclass(frozen=True)
class DPO(Objective):
    """Direct Preference Optimization (see `dpo_loss`).

    Args:
        beta: How strongly the policy is held to the reference, > 0.
    """

    view: ClassVar[View] = "paired"

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def losses(self, scores: CompletionLogps, desirable: Tensor | None = None, z0: Tensor | None = None) -> Tensor:
        chosen, rejected = scores.pairs()
        return dpo_loss(chosen.logratio, rejected.logratio, beta=self.beta)

    def rewards(self, scores: CompletionLogps) -> Tensor:
        """beta · logratio, chosen rows first."""
        return self.beta * scores.logratio.detach()
