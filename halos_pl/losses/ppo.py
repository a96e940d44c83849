"""Offline PPO: the clipped surrogate on logged completions, the reference in the place of the old policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from halos_pl.batch import CompletionLogps, View
from halos_pl.losses.advantage import generalized_advantage, rows_of
from halos_pl.losses.checks import check_floating, check_positive, check_range
from halos_pl.losses.objective import LogRatioObjective, Unit, labels

RewardFrom = Literal["label", "score"]
RATIO_LIMIT = 20.0
"""Above this log-ratio, in nats, the probability ratio goes on as a straight line, so that none overflows."""


def ppo_offline_loss(token_logratio: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """The clipped surrogate of each token (KTO report, section 3.3; Schulman et al. 2017, equation 7).

        ratio = exp(token_logratio)
        loss = −min(ratio·advantage, clip(ratio, clip_low, clip_high)·advantage)

    The report prints log(ratio) in the place of the ratio. Its code takes the ratio, and so do we: the printed form is
    clipped around a log-ratio of 1, not 0, so that where training starts, at log-ratio 0, tokens of an undesirable
    completion get no gradient. Here they get one of the same size as the others.

    Args:
        token_logratio: [N] log-probability of each token, policy − reference, in nats. Above 20 the ratio goes on as a
            straight line.
        advantage: [N] how much better than expected each token is; ±1 by the label in the report.
        clip_low: In (0, 1]; the ratio below which a negative advantage pushes no further.
        clip_high: ≥ 1; the ratio above which a positive advantage pushes no further.

    Returns:
        [N] losses in token_logratio's dtype.

    Raises:
        ValueError: on unequal shapes, inputs that are NaN or not floating point, or bounds out of range.

    Example:
        >>> import torch
        >>> ppo_offline_loss(torch.zeros(2), torch.tensor([1.0, -1.0]), clip_low=0.5, clip_high=2.0)
        tensor([-1.,  1.])
    """
    _check_clip(clip_low, clip_high)
    check_floating(token_logratio=token_logratio, advantage=advantage)
    ratio = _ratio(token_logratio)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(clip_low, clip_high) * advantage)
    return torch.where(advantage == 0, 0.0, -surrogate)  # also where the ratio is infinite


@dataclass(frozen=True)
class PPOOffline(LogRatioObjective):
    """Offline PPO (see `ppo_offline_loss`): the mean over tokens, reference as the old policy.

    Args:
        clip_low: Ratio below which undesirable tokens are pushed no further, in (0, 1].
        clip_high: Ratio above which desirable tokens are pushed no further, >= 1.
        reward: "label": 1 for desirable completions, -1 for others; "score": the number under a row's key `score`.
        critic: Train a linear value head too. The reward then comes with a completion's last token, and advantages are
            generalized advantage estimates, brought to mean 0 and variance 1 over the micro-batch, as in the paper's
            code. Without, a token's advantage is the reward of its completion.
        gamma: Discount of a token, in [0, 1] (with the critic).
        gae_lambda: In [0, 1] (with the critic).
        critic_coef: Weight of the critic's loss ½(value − return)², >= 0.
        kl_coef: Weight of a penalty for leaving the reference, >= 0: per token ratio − 1 − log(ratio), which is never
            negative and estimates KL(reference‖policy) on the reference's own completions. (The paper's code takes
            −log(ratio): the same on average, but minimised by making every token likelier.)
        humanline: Bounds of every token's log-ratio, [-1.0, 1.5] in HALOs; a token outside gets no gradient.
    """

    view: ClassVar[View] = "unpaired"
    unit: ClassVar[Unit] = "token"
    formula: ClassVar[str] = "−min(ρA, clip(ρ)A) of each token, ρ = π/π_ref, A = ±1"
    source: ClassVar[str] = "KTO report §3.3; Schulman et al. 2017"

    clip_low: float = 0.5
    clip_high: float = 2.0
    reward: RewardFrom = "label"
    critic: bool = False
    gamma: float = 0.99
    gae_lambda: float = 0.95
    critic_coef: float = 0.01
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clip(self.clip_low, self.clip_high)
        if self.reward not in get_args(RewardFrom):
            raise ValueError(f"reward must be one of {', '.join(get_args(RewardFrom))}, got {self.reward!r}")
        if not isinstance(self.critic, bool):
            raise ValueError(f"critic must be true or false, got {self.critic!r}")
        check_range("gamma", self.gamma, "[0, 1]")
        check_range("gae_lambda", self.gae_lambda, "[0, 1]")
        check_positive("critic_coef", self.critic_coef, or_zero=True)
        check_positive("kl_coef", self.kl_coef, or_zero=True)

    @property
    def needs_scores(self) -> bool:
        return self.reward == "score"

    @property
    def needs_value_head(self) -> bool:
        return self.critic

    def losses(self, scores: CompletionLogps, desirable: Tensor | None, z0: Tensor | None = None) -> Tensor:
        logratio = self._logratio(scores)
        advantage, returns = self._advantages(scores, desirable)
        loss = ppo_offline_loss(logratio, advantage, clip_low=self.clip_low, clip_high=self.clip_high)
        if self.critic:
            loss = loss + self.critic_coef * _critic_loss(scores, returns)
        if self.kl_coef:
            loss = loss + self.kl_coef * _divergence(logratio)
        return loss

    def rewards(self, scores: CompletionLogps) -> Tensor:
        """logratio."""
        return scores.logratio.detach()

    def diagnostics(self, scores: CompletionLogps, desirable: Tensor | None) -> Mapping[str, Tensor]:
        advantage, returns = self._advantages(scores, desirable)
        ratio = _ratio(self._logratio(scores).detach())
        clipped = ((advantage > 0) & (ratio > self.clip_high)) | ((advantage < 0) & (ratio < self.clip_low))
        more = {"ppo/critic_loss": _critic_loss(scores, returns).detach()} if self.critic else {}
        return {**super().diagnostics(scores, desirable), "ppo/clipped": clipped, **more}

    def _logratio(self, scores: CompletionLogps) -> Tensor:
        if scores.token_logratio is None:
            raise ValueError("token_logratio must be [N] for PPOOffline, got None: it compares with a reference")
        return scores.token_logratio

    def _advantages(self, scores: CompletionLogps, desirable: Tensor | None) -> tuple[Tensor, Tensor]:
        """Advantage and return of each token, [N] each."""
        logratio = self._logratio(scores)
        if self.reward == "label":
            by_row = torch.where(labels(self, desirable), 1.0, -1.0)
        elif scores.score is None:
            raise ValueError("score must be [R] for PPOOffline(reward='score'), got None: every row needs its score")
        else:
            by_row = scores.score
        reward = by_row.to(logratio.dtype)[rows_of(scores.length, logratio.shape[0])]
        if not self.critic:
            return reward, reward
        if scores.value is None:
            raise ValueError("value must be [N] for PPOOffline(critic=True), got None: the policy has no value head")
        last = torch.zeros_like(reward).index_fill(0, scores.length.cumsum(0) - 1, 1.0)
        value = scores.value.to(logratio.dtype)
        advantage, returns = generalized_advantage(
            value, reward * last, scores.length, gamma=self.gamma, gae_lambda=self.gae_lambda
        )
        variance, mean = torch.var_mean(advantage, correction=0)
        return (advantage - mean) * (variance + 1e-8).rsqrt(), returns


def _ratio(logratio: Tensor) -> Tensor:
    bounded = logratio.clamp_max(RATIO_LIMIT)
    return bounded.exp() * (1 + logratio - bounded)


def _divergence(logratio: Tensor) -> Tensor:
    """ratio − 1 − log(ratio), exact near 0."""
    bounded = logratio.clamp_max(RATIO_LIMIT)
    return torch.expm1(bounded) + bounded.exp() * (logratio - bounded) - logratio


def _critic_loss(scores: CompletionLogps, returns: Tensor) -> Tensor:
    assert scores.value is not None
    return 0.5 * (scores.value.to(returns.dtype) - returns).square()


def _check_clip(low: float, high: float) -> None:
    check_range("clip_low", low, "(0, 1]")
    check_range("clip_high", high, "[1, inf)")
