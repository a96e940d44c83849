"""Simple Preference Optimization: mean log-probabilities as rewards, and no reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from halos_pl.batch import CompletionLogps, View
from halos_pl.losses.checks import check_floating, check_lengths, check_positive
from halos_pl.losses.objective import Objective


def simpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: float,
    gamma: float,
) -> Tensor:
    """SimPO's loss of each preference pair (Meng et al. 2024, equation 6).

        loss = −log σ(beta·(chosen_logp / chosen_length − rejected_logp / rejected_length) − gamma)

    Nothing is added to it (TRL's CPO trainer, which has it too, adds a likelihood term by default).

    Args:
        chosen_logp: [B] log-probability of the preferred completion under the policy, in nats.
        rejected_logp: [B] of the other one.
        chosen_length: [B] integers ≥ 1, tokens of the preferred completion, EOS included.
        rejected_length: [B] of the other one.
        beta: > 0; scale of the rewards.
        gamma: ≥ 0; the margin that the rewards shall differ by.

    Returns:
        [B] losses in the log-probabilities' dtype.

    Raises:
        ValueError: on unequal shapes, log-probabilities that are NaN or not floating point, lengths that are not
            integers ≥ 1, or a number out of range.

    Example:
        >>> import torch
        >>> logp, length = torch.tensor([-6.0]), torch.tensor([3])
        >>> simpo_loss(logp, logp, length, length, beta=2.0, gamma=0.0).exp()  # equal completions: log 2
        tensor([2.])
    """
    check_positive("beta", beta)
    check_positive("gamma", gamma, or_zero=True)
    check_floating(chosen_logp=chosen_logp, rejected_logp=rejected_logp)
    check_lengths(chosen_logp, chosen_length=chosen_length, rejected_length=rejected_length)
    margin = chosen_logp / chosen_length - rejected_logp / rejected_length
    return -F.logsigmoid(beta * margin - gamma)


@dataclass(frozen=True)
class SimPO(Objective):
    """Simple Preference Optimization (see `simpo_loss`); no reference model is loaded.

    Args:
        beta: Scale of the rewards, > 0.
        gamma: Margin that the rewards shall differ by, >= 0 (the paper's γ).
    """

    view: ClassVar[View] = "paired"
    needs_reference: ClassVar[bool] = False
    length_normalised: ClassVar[bool] = True
    formula: ClassVar[str] = "−log σ(β(ℓ̄_w − ℓ̄_l) − γ)"
    source: ClassVar[str] = "Meng et al. 2024"

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_positive("gamma", self.gamma, or_zero=True)

    def losses(self, scores: CompletionLogps, desirable: Tensor | None = None, z0: Tensor | None = None) -> Tensor:
        chosen, rejected = scores.pairs()
        return simpo_loss(chosen.logp, rejected.logp, chosen.length, rejected.length, beta=self.beta, gamma=self.gamma)

    def rewards(self, scores: CompletionLogps) -> Tensor:
        """beta · logp / length, chosen rows first."""
        return self.beta * scores.logp.detach() / scores.length
