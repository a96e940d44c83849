"""Expected numbers are derived by hand with the math module in float64: Schulman et al. 2017 (PPO), equation 7, on
offline data with the ratio to the reference; Schulman et al. 2016 (GAE), equations 11 to 16; Schulman 2020, "k3"."""

from __future__ import annotations

import doctest
import importlib
import math
import re

import pytest
import torch

from halos_pl.batch import CompletionLogps
from halos_pl.losses import PPOOffline, ppo_offline_loss
from halos_pl.losses.advantage import generalized_advantage

LOGRATIO = [-5.0, -1.0, -0.3, 0.0, 0.3, 0.8, 3.0]
ROWS = [3, 1, 4, 1, 2]
DESIRABLE = [True, False, False, True, True]
SCORE = [2.0, -0.5, 1.5, -3.0, 0.25]
TOKENS = [-2.0, -0.6, 0.2, 0.5, -0.1, 0.0, 0.9, -0.9, 0.3, 1.7, -0.4]
VALUES = [0.3, -0.8, 1.2, 0.4, 0.0, -1.5, 2.0, 0.7, -0.2, 0.9, 0.1]


def leaf(x, dtype=torch.float64):
    return torch.tensor(x, dtype=dtype, requires_grad=True)


def clipped(x: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """−min(ρA, clamp(ρ)·A) and its slope in x = log ρ. For A > 0 the minimum is flat above `high`, for A < 0 below
    `low`; elsewhere it is ρA itself, whose slope in x is ρA again."""
    ratio = math.exp(x)
    if advantage >= 0:
        return -min(ratio, high) * advantage, -ratio * advantage * (ratio < high)
    return -max(ratio, low) * advantage, -ratio * advantage * (ratio > low)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 2.5, -0.3, 0.0])
@pytest.mark.parametrize("clip", [(0.5, 2.0), (0.8, 1.2), (0.01, 1.0), (1.0, 30.0)])
def test_losses_and_gradients_by_hand(advantage, clip):
    lr = leaf([x + 1e-3 for x in LOGRATIO])  # off the kink that a clip of 1 has at ρ = 1
    loss = ppo_offline_loss(lr, torch.full_like(lr, advantage).detach(), clip_low=clip[0], clip_high=clip[1])
    loss.sum().backward()
    expected = [clipped(x, advantage, *clip) for x in lr.tolist()]
    assert loss.tolist() == pytest.approx([e[0] for e in expected], rel=1e-12, abs=1e-15)
    assert lr.grad.tolist() == pytest.approx([e[1] for e in expected], rel=1e-12, abs=1e-15)


def test_at_the_reference_the_gradient_is_minus_the_advantage_of_either_sign():
    """The KTO report prints a logarithm of the clipped minimum, which has no gradient where A < 0."""
    lr = leaf([0.0, 0.0, 0.0])
    advantage = torch.tensor([1.0, -1.0, -2.5], dtype=torch.float64)
    loss = ppo_offline_loss(lr, advantage, clip_low=0.5, clip_high=2.0)
    loss.sum().backward()
    assert loss.tolist() == [-1.0, 1.0, 2.5]
    assert lr.grad.tolist() == [-1.0, 1.0, 2.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extreme_logratios_stay_finite(dtype, advantage):
    lr = leaf([1e4, -1e4, 300.0, -300.0], dtype)
    loss = ppo_offline_loss(lr, torch.full_like(lr, advantage).detach(), clip_low=0.5, clip_high=2.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert lr.grad.isfinite().all()
    assert loss.tolist()[1] == (0.0 if advantage > 0 else 0.5)
    assert lr.grad.tolist()[1] == 0.0
    if advantage > 0:
        assert (loss.tolist()[0], lr.grad.tolist()[0]) == (-2.0, 0.0)


def test_finite_differences():
    a = torch.tensor([1.0, -1.0, 0.5, -2.0, 3.0, 1.0, -0.7], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ppo_offline_loss(x, a, clip_low=0.5, clip_high=2.0), leaf(LOGRATIO))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_stays(dtype):
    lr = leaf(LOGRATIO, dtype)
    assert ppo_offline_loss(lr, torch.ones_like(lr).detach(), clip_low=0.5, clip_high=2.0).dtype == dtype


GOOD = {"token_logratio": torch.zeros(3), "advantage": torch.ones(3), "clip_low": 0.5, "clip_high": 2.0}


@pytest.mark.parametrize("name", ["token_logratio", "advantage"])
@pytest.mark.parametrize("bad", [torch.zeros(3).long(), torch.zeros(3).bool(), torch.tensor([0.0, math.nan, 1.0])])
def test_bad_tensors_are_named(name, bad):
    with pytest.raises(ValueError, match=name):
        ppo_offline_loss(**{**GOOD, name: bad})


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2,)])
def test_nothing_broadcasts(shape):
    with pytest.raises(ValueError, match="advantage"):
        ppo_offline_loss(**{**GOOD, "advantage": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("name", "bad"),
    [("clip_low", x) for x in (0.0, -0.5, 1.01, math.inf, math.nan)]
    + [("clip_high", x) for x in (0.0, -2.0, 0.99, math.inf, math.nan)],
)
def test_bad_clips_are_named_by_the_function_and_by_the_objective(name, bad):
    message = f"{name} must be .*{re.escape(repr(bad))}"
    with pytest.raises(ValueError, match=message):
        ppo_offline_loss(**{**GOOD, name: bad})
    with pytest.raises(ValueError, match=message):
        PPOOffline(**{name: bad})


def gae(value, reward, length, gamma, lam):
    """The double sum of the definition, row by row."""
    advantages, returns, start = [], [], 0
    for n in length:
        v, r = [*value[start : start + n], 0.0], reward[start : start + n]
        for t in range(n):
            delta = [r[u] + gamma * v[u + 1] - v[u] for u in range(t, n)]
            advantages.append(sum((gamma * lam) ** k * d for k, d in enumerate(delta)))
            returns.append(sum(gamma**k * r[t + k] for k in range(n - t)))
        start += n
    return advantages, returns


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("length", [ROWS, [11], [1] * 11, [1, 10], [10, 1]])
def test_generalized_advantage_by_the_definition(gamma, lam, length):
    value, reward = leaf(VALUES), leaf(TOKENS)
    advantage, returns = generalized_advantage(value, reward, torch.tensor(length), gamma=gamma, gae_lambda=lam)
    expected = gae(VALUES, TOKENS, length, gamma, lam)
    assert advantage.tolist() == pytest.approx(expected[0], rel=1e-12, abs=1e-14)
    assert returns.tolist() == pytest.approx(expected[1], rel=1e-12, abs=1e-14)
    assert advantage.dtype == returns.dtype == torch.float64
    assert not advantage.requires_grad
    assert not returns.requires_grad


def test_generalized_advantage_of_a_long_row():
    """All the reward at the end of 2,000 tokens: the return t tokens before is γᵗ."""
    n = 2000
    reward = torch.zeros(n, dtype=torch.float64)
    reward[-1] = 1.0
    zero = torch.zeros_like(reward)
    advantage, returns = generalized_advantage(zero, reward, torch.tensor([n]), gamma=0.99, gae_lambda=0.95)
    assert returns[[0, -2, -1]].tolist() == pytest.approx([0.99**1999, 0.99, 1.0], rel=1e-10)
    assert advantage[[0, -2, -1]].tolist() == pytest.approx([(0.99 * 0.95) ** 1999, 0.99 * 0.95, 1.0], rel=1e-10)


ROLLOUT = {"value": torch.zeros(3), "reward": torch.zeros(3), "length": torch.tensor([2, 1])}
ROLLOUT |= {"gamma": 0.99, "gae_lambda": 0.95}


@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, x) for name in ("value", "reward") for x in (torch.zeros(3).long(), torch.tensor([0.0, math.nan, 1.0]))]
    + [("reward", torch.zeros(x)) for x in ((), (1,), (3, 1), (4,))]
    + [("length", torch.tensor(x)) for x in ([2, 2], [2], [2.0, 1.0], [3, 0], [4, -1])],
)
def test_bad_rollouts_are_named(name, bad):
    with pytest.raises(ValueError, match=name):
        generalized_advantage(**{**ROLLOUT, name: bad})


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
@pytest.mark.parametrize("bad", [-0.1, 1.1, math.inf, math.nan])
def test_bad_discounts_are_named_by_the_function_and_by_the_objective(name, bad):
    message = f"{name} must be .*, got {re.escape(repr(bad))}"
    with pytest.raises(ValueError, match=message):
        generalized_advantage(**{**ROLLOUT, name: bad})
    with pytest.raises(ValueError, match=message):
        PPOOffline(**{name: bad})


@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, x) for name in ("critic_coef", "kl_coef") for x in (-0.1, math.inf, math.nan)]
    + [("reward", "labels"), ("reward", None), ("critic", "no")],
)
def test_bad_fields_are_named(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {re.escape(repr(bad))}"):
        PPOOffline(**{name: bad})


def scores(lr, **fields):
    """Whatever the test does not hand in is poisoned or absent."""
    row, token = torch.full((len(ROWS),), math.nan), torch.full((len(TOKENS),), math.nan)
    return CompletionLogps(
        row, logp=row, length=torch.tensor(ROWS), token_logp=token, ref_logp=row, token_logratio=lr, **fields
    )


def spread(per_row):
    return [x for x, n in zip(per_row, ROWS, strict=True) for _ in range(n)]


def last(per_row):
    return [x * (k == n - 1) for x, n in zip(per_row, ROWS, strict=True) for k in range(n)]


LABEL = [1.0 if d else -1.0 for d in DESIRABLE]


@pytest.mark.parametrize("reward", ["label", "score"])
@pytest.mark.parametrize("clip", [{"clip_low": 0.5, "clip_high": 2.0}, {"clip_low": 0.9, "clip_high": 1.1}])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_objective_gives_every_token_the_reward_of_its_row(reward, clip, kl_coef):
    lr, nan = leaf(TOKENS), torch.full((len(TOKENS),), math.nan)
    by_label = reward == "label"
    fields = {"value": nan, "score": torch.full((len(ROWS),), math.nan) if by_label else torch.tensor(SCORE)}
    labels = torch.tensor(DESIRABLE)
    loss = PPOOffline(**clip, reward=reward, kl_coef=kl_coef).losses(scores(lr, **fields), labels, None)
    loss.sum().backward()
    advantage = spread(LABEL if by_label else SCORE)
    expected = [clipped(x, a, *clip.values()) for x, a in zip(TOKENS, advantage, strict=True)]
    k3 = [(math.exp(x) - 1 - x, math.exp(x) - 1) for x in TOKENS]
    for i, got in enumerate((loss, lr.grad)):
        want = [e[i] + kl_coef * k[i] for e, k in zip(expected, k3, strict=True)]
        assert got.tolist() == pytest.approx(want, rel=1e-12, abs=1e-15)


DEFAULTS = {"clip_low": 0.5, "clip_high": 2.0, "gamma": 0.99, "gae_lambda": 0.95, "critic_coef": 0.01, "kl_coef": 0.0}
OTHER = {"clip_low": 0.9, "clip_high": 1.1, "gamma": 0.7, "gae_lambda": 0.3, "critic_coef": 0.4, "kl_coef": 0.3}


@pytest.mark.parametrize("reward", ["label", "score"])
@pytest.mark.parametrize("name", [None, *OTHER])
def test_objective_with_a_critic(reward, name):
    fields = {name: OTHER[name]} if name else {}
    lr, value = leaf(TOKENS), leaf(VALUES)
    score = torch.tensor(SCORE, dtype=torch.float64) if reward == "score" else None
    objective = PPOOffline(critic=True, reward=reward, **fields)
    loss = objective.losses(scores(lr, value=value, score=score), torch.tensor(DESIRABLE), None)
    loss.sum().backward()
    use = DEFAULTS | fields
    advantage, returns = gae(VALUES, last(LABEL if reward == "label" else SCORE), ROWS, use["gamma"], use["gae_lambda"])
    mean = sum(advantage) / len(advantage)
    scale = math.sqrt(sum((a - mean) ** 2 for a in advantage) / len(advantage) + 1e-8)
    white = [(a - mean) / scale for a in advantage]
    expected = [clipped(x, a, use["clip_low"], use["clip_high"]) for x, a in zip(TOKENS, white, strict=True)]
    off = [v - r for v, r in zip(VALUES, returns, strict=True)]
    want = [
        e[0] + use["critic_coef"] * 0.5 * d * d + use["kl_coef"] * (math.exp(x) - 1 - x)
        for e, d, x in zip(expected, off, TOKENS, strict=True)
    ]
    assert loss.tolist() == pytest.approx(want, rel=1e-11, abs=1e-14)
    slopes = [e[1] + use["kl_coef"] * (math.exp(x) - 1) for e, x in zip(expected, TOKENS, strict=True)]
    assert lr.grad.tolist() == pytest.approx(slopes, rel=1e-11, abs=1e-14)
    # the value head learns from its own error alone: advantages are detached
    assert value.grad.tolist() == pytest.approx([use["critic_coef"] * d for d in off], rel=1e-12)


def test_critic_of_a_single_token_stays_finite():
    row, lr, value = torch.zeros(1), leaf([0.1]), leaf([0.4])
    one = CompletionLogps(row, row, torch.tensor([1]), row, token_logratio=lr, value=value)
    loss = PPOOffline(critic=True, critic_coef=2.0).losses(one, torch.tensor([True]), None)
    assert loss.tolist() == pytest.approx([0.36], abs=1e-12)  # nothing is left of the advantage; 2·½·(0.4 − 1)²


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("critic", [False, True])
def test_objective_stays_finite(dtype, critic):
    lr, value = leaf([1e4, -1e4] * 5 + [0.0], dtype), leaf(VALUES, dtype)
    objective = PPOOffline(critic=critic, kl_coef=0.1)
    loss = objective.losses(scores(lr, value=value), torch.tensor(DESIRABLE), None)
    loss.sum().backward()
    assert loss.dtype == dtype
    assert loss.isfinite().all()
    assert lr.grad.isfinite().all()


def test_objective_refuses_what_is_missing():
    lr, desirable = leaf(TOKENS), torch.tensor(DESIRABLE)
    with pytest.raises(ValueError, match="desirable"):
        PPOOffline().losses(scores(lr), None, None)
    with pytest.raises(ValueError, match="token_logratio"):
        PPOOffline().losses(scores(None), desirable, None)
    with pytest.raises(ValueError, match="score"):
        PPOOffline(reward="score").losses(scores(lr), desirable, None)
    with pytest.raises(ValueError, match="value"):
        PPOOffline(critic=True).losses(scores(lr), desirable, None)


def test_what_the_objective_declares():
    declared = (PPOOffline.view, PPOOffline.unit, PPOOffline.needs_reference, PPOOffline().reference_point_from)
    assert declared == ("unpaired", "token", True, "none")
    needs = [(x.needs_scores, x.needs_value_head) for x in (PPOOffline(), PPOOffline(reward="score", critic=True))]
    assert needs == [(False, False), (True, True)]
    assert PPOOffline() == PPOOffline(**DEFAULTS, reward="label", critic=False)
    row = torch.zeros(len(ROWS), requires_grad=True)
    rewards = PPOOffline().rewards(CompletionLogps(row, row, torch.tensor(ROWS), leaf(TOKENS)))
    assert rewards is None or (rewards.shape == row.shape and not rewards.requires_grad)


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.losses.ppo"))
    assert result.attempted
    assert not result.failed
