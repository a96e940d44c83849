"""Odds Ratio Preference Optimization: likelihood of the preferred completion, and the odds against the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from halos_pl.batch import CompletionLogps, View
from halos_pl.losses.checks import check_floating, check_lengths, check_positive
from halos_pl.losses.objective import Objective


def orpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    lambda_coef: float,
) -> Tensor:
    """ORPO's loss of each preference pair (Hong et al. 2024, equations 6 and 7).

        p = exp(logp / length)        odds = p / (1 − p)
        loss = −chosen_logp / chosen_length − lambda_coef·log σ(log odds_chosen − log odds_rejected)

    Args:
        chosen_logp: [B] log-probability of the preferred completion under the policy, in nats.
        rejected_logp: [B] of the other one.
        chosen_length: [B] integers ≥ 1, tokens of the preferred completion, EOS included.
        rejected_length: [B] of the other one.
        lambda_coef: ≥ 0; weight of the odds ratio.

    Returns:
        [B] losses in the log-probabilities' dtype; finite for p = 1 too.

    Raises:
        ValueError: on unequal shapes, log-probabilities that are NaN or not floating point, lengths that are not
            integers ≥ 1, or lambda_coef out of range.

    Example:
        >>> import torch
        >>> logp, length = torch.tensor([-2.0]), torch.tensor([4])
        >>> orpo_loss(logp, logp, length, length, lambda_coef=0.0)
        tensor([0.5000])
    """
    check_positive("lambda_coef", lambda_coef, or_zero=True)
    check_floating(chosen_logp=chosen_logp, rejected_logp=rejected_logp)
    check_lengths(chosen_logp, chosen_length=chosen_length, rejected_length=rejected_length)
    chosen, rejected = chosen_logp / chosen_length, rejected_logp / rejected_length
    return -chosen - lambda_coef * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 − p)) [any] from log p; p is held one rounding below 1, where the odds are infinite."""
    logp = logp.clamp_max(-torch.finfo(logp.dtype).eps)
    return logp - (-torch.expm1(logp)).log()


@dataclass(frozen=True)
class ORPO(Objective):
    """Odds Ratio Preference Optimization (see `orpo_loss`); no reference model is loaded.

    Args:
        lambda_coef: Weight of the odds ratio, >= 0.
    """

    view: ClassVar[View] = "paired"
    needs_reference: ClassVar[bool] = False
    length_normalised: ClassVar[bool] = True
    formula: ClassVar[str] = "−ℓ̄_w − λ log σ(log odds_w − log odds_l)"
    source: ClassVar[str] = "Hong et al. 2024"

    lambda_coef: float = 0.25

    def __post_init__(self) -> None:
        check_positive("lambda_coef", self.lambda_coef, or_zero=True)

    def losses(self, scores: CompletionLogps, desirable: Tensor | None = None, z0: Tensor | None = None) -> Tensor:
        chosen, rejected = scores.pairs()
        return orpo_loss(chosen.logp, rejected.logp, chosen.length, rejected.length, lambda_coef=self.lambda_coef)

    def rewards(self, scores: CompletionLogps) -> Tensor:
        """lambda_coef · log odds, chosen rows first."""
        return self.lambda_coef * _log_odds(scores.logp.detach() / scores.length)
