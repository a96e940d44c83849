"""Identity Preference Optimization: a margin to reach, not to exceed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from halos_pl.batch import CompletionLogps, View
from halos_pl.losses.checks import check_floating, check_lengths, check_positive
from halos_pl.losses.objective import LogRatioObjective


def ipo_loss(
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    tau: float,
) -> Tensor:
    """IPO's loss of each preference pair (Azar et al. 2023, equation 17).

        loss = (chosen_logratio / chosen_length − rejected_logratio / rejected_length − 1 / (2·tau))²

    Log-ratios are means over tokens, the convention of TRL and HALOs; the paper's equation has sums.

    Args:
        chosen_logratio: [B] log-probability of the preferred completion, policy − reference, in nats.
        rejected_logratio: [B] of the other one.
        chosen_length: [B] integers ≥ 1, tokens of the preferred completion, EOS included.
        rejected_length: [B] of the other one.
        tau: > 0; the margin to reach is 1 / (2·tau) nats a token.

    Returns:
        [B] losses in the log-ratios' dtype.

    Raises:
        ValueError: on unequal shapes, log-ratios that are NaN or not floating point, lengths that are not integers ≥ 1,
            or tau out of range.

    Example:
        >>> import torch
        >>> zero, length = torch.tensor([0.0]), torch.tensor([7])
        >>> ipo_loss(zero, zero, length, length, tau=0.5)  # policy == reference: (1 / (2·tau))²
        tensor([1.])
    """
    check_positive("tau", tau)
    check_floating(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    check_lengths(chosen_logratio, chosen_length=chosen_length, rejected_length=rejected_length)
    margin = chosen_logratio / chosen_length - rejected_logratio / rejected_length
    return (margin - 1 / (2 * tau)).square()


@dataclass(frozen=True)
class IPO(LogRatioObjective):
    """Identity Preference Optimization (see `ipo_loss`).

    Args:
        tau: How strongly the policy is held to the reference, > 0: the margin is 1 / (2·tau) nats a token.
        humanline: Bounds of every token's log-ratio, [-1.0, 1.5] in HALOs; a token outside gets no gradient.
    """

    view: ClassVar[View] = "paired"
    length_normalised: ClassVar[bool] = True
    formula: ClassVar[str] = "(r̄_w − r̄_l − 1/(2τ))²"
    source: ClassVar[str] = "Azar et al. 2023"

    tau: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("tau", self.tau)

    def losses(self, scores: CompletionLogps, desirable: Tensor | None = None, z0: Tensor | None = None) -> Tensor:
        chosen, rejected = scores.pairs()
        return ipo_loss(chosen.logratio, rejected.logratio, chosen.length, rejected.length, tau=self.tau)

    def rewards(self, scores: CompletionLogps) -> Tensor:
        """tau · logratio / length, chosen rows first."""
        return self.tau * scores.logratio.detach() / scores.length
