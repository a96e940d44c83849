"""Sequence Likelihood Calibration: a hinge between two completions, and a likelihood term that keeps the language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from halos_pl.batch import CompletionLogps, View
from halos_pl.losses.checks import check_floating, check_positive
from halos_pl.losses.objective import Objective


def slic_loss(chosen_logp: Tensor, rejected_logp: Tensor, *, beta: float, lambda_coef: float) -> Tensor:
    """SLiC's loss of each preference pair (KTO report, equation 5, with the regulariser as a likelihood term).

        loss = max(0, beta − chosen_logp + rejected_logp) − lambda_coef·chosen_logp

    Args:
        chosen_logp: [B] log-probability of the preferred completion under the policy, in nats.
        rejected_logp: [B] of the other one.
        beta: > 0; the margin to reach, in nats.
        lambda_coef: ≥ 0; weight of the likelihood of the preferred completion.

    Returns:
        [B] losses in the inputs' dtype.

    Raises:
        ValueError: on unequal shapes, inputs that are NaN or not floating point, or a number out of range.

    Example:
        >>> import torch
        >>> slic_loss(torch.tensor([-4.0]), torch.tensor([-4.5]), beta=1.0, lambda_coef=0.1)
        tensor([0.9000])
    """
    check_positive("beta", beta)
    check_positive("lambda_coef", lambda_coef, or_zero=True)
    check_floating(chosen_logp=chosen_logp, rejected_logp=rejected_logp)
    return (beta - chosen_logp + rejected_logp).clamp_min(0) - lambda_coef * chosen_logp


@dataclass(frozen=True)
class SLiC(Objective):
    """Sequence Likelihood Calibration (see `slic_loss`); no reference model is loaded.

    Args:
        beta: Margin to reach, in nats, > 0.
        lambda_coef: Weight of the likelihood of the preferred completion, >= 0.
    """

    view: ClassVar[View] = "paired"
    needs_reference: ClassVar[bool] = False
    formula: ClassVar[str] = "max(0, β − ℓ_w + ℓ_l) − λ ℓ_w"
    source: ClassVar[str] = "Zhao et al. 2023"

    beta: float = 1.0
    lambda_coef: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_positive("lambda_coef", self.lambda_coef, or_zero=True)

    def losses(self, scores: CompletionLogps, desirable: Tensor | None = None, z0: Tensor | None = None) -> Tensor:
        chosen, rejected = scores.pairs()
        return slic_loss(chosen.logp, rejected.logp, beta=self.beta, lambda_coef=self.lambda_coef)

    def rewards(self, scores: CompletionLogps) -> Tensor:
        """logp, chosen rows first."""
        return scores.logp.detach()
