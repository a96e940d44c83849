"""Expected numbers are derived by hand: Hong et al. 2024, equations 4, 6 and 7, with log1p and expm1 in float64."""

from __future__ import annotations

import doctest
import importlib
import math
import re

import pytest
import torch

from halos_pl.batch import CompletionLogps
from halos_pl.losses import ORPO, orpo_loss

CHOSEN, REJECTED = [-3.0, -41.0, -0.5, -8.0, -700.0, -2.0], [-11.0, -2.0, -0.5, -30.0, -3.5, -0.75]
CHOSEN_LENGTH, REJECTED_LENGTH = [1, 4, 7, 512, 20, 3], [3, 1, 7, 100, 5, 1]


def inputs(dtype=torch.float64, chosen=CHOSEN, rejected=REJECTED):
    return tuple(torch.tensor(x, dtype=dtype, requires_grad=True) for x in (chosen, rejected))


def lengths(dtype=torch.int64):
    return torch.tensor(CHOSEN_LENGTH, dtype=dtype), torch.tensor(REJECTED_LENGTH, dtype=dtype)


def softplus(x: float) -> float:
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def truth(chosen, rejected, m, n, lambda_coef):
    """Loss, d loss/d ℓ_w and d loss/d ℓ_l. With a = ℓ_w/m and b = ℓ_l/n the log odds are a − log(1 − eᵃ), where
    1 − eᵃ = −expm1(a) loses no digit, and their slope is 1/(1 − eᵃ)."""
    a, b = chosen / m, rejected / n
    d = (a - math.log(-math.expm1(a))) - (b - math.log(-math.expm1(b)))
    wrong = 1 / (1 + math.exp(d)) if d < 0 else math.exp(-d) / (1 + math.exp(-d))  # σ(−d)
    slope_chosen = -1 + lambda_coef * wrong / math.expm1(a)
    return -a + lambda_coef * softplus(-d), slope_chosen / m, -lambda_coef * wrong / math.expm1(b) / n


def check(chosen, rejected, chosen_length, rejected_length, lambda_coef):
    tensors = inputs(chosen=chosen, rejected=rejected)
    loss = orpo_loss(*tensors, torch.tensor(chosen_length), torch.tensor(rejected_length), lambda_coef=lambda_coef)
    loss.sum().backward()
    rows = zip(chosen, rejected, chosen_length, rejected_length, strict=True)
    expected = [truth(*row, lambda_coef) for row in rows]
    for got, want in zip((loss, *(x.grad for x in tensors)), zip(*expected, strict=True), strict=True):
        assert got.tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("lambda_coef", [0.0, 0.25, 2.0])
def test_losses_and_gradients_by_hand(lambda_coef):
    check(CHOSEN, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH, lambda_coef)


def test_near_certain_completions_by_hand():
    """Near p = 1 a naive log(1 − exp) is off by 1e-7."""
    check([-1e-9, -3e-9, -2.0, -1e-9, -5e-6], [-2.0, -1e-9, -1e-9, -1e-9, -0.7], [1, 3, 2, 1, 4], [2, 1, 1, 1, 7], 0.25)


def test_either_side_of_where_log1mexp_may_branch():
    at = math.log(2)
    chosen = [-at, -at + 1e-3, -at - 1e-3, -1.0, -1e-3]
    check(chosen, [-3.0, -0.1, -0.2, -40.0, -30.0], [1] * 5, [1] * 5, 0.5)


def test_textbook_odds():
    """p = 3/4 against p = 1/3: odds 3 against 1/2, so −log σ(log 6) = log(7/6)."""
    chosen, rejected = (torch.tensor([2 * math.log(p)], dtype=torch.float64) for p in (3 / 4, 1 / 3))
    loss = orpo_loss(chosen, rejected, torch.tensor([2]), torch.tensor([2]), lambda_coef=0.5)
    assert loss.item() == pytest.approx(math.log(4 / 3) + 0.5 * math.log(7 / 6), rel=1e-12)


def test_finite_differences():
    chosen, rejected = inputs(chosen=CHOSEN[:4], rejected=REJECTED[:4])
    m, n = (x[:4] for x in lengths())
    assert torch.autograd.gradcheck(lambda c, r: orpo_loss(c, r, m, n, lambda_coef=0.7), (chosen, rejected))


EDGES = [0.0, -0.0, 1e-7, 1e-9, -1e-12, -1e-7, -0.7, -1e4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 3])
def test_certain_and_impossible_completions_stay_finite(dtype, length):
    """Every pair of edges, p = 1 and what rounding makes of it included."""
    grid = torch.cartesian_prod(torch.tensor(EDGES, dtype=torch.float64), torch.tensor(EDGES, dtype=torch.float64))
    chosen, rejected = (x.to(dtype).requires_grad_() for x in grid.unbind(1))
    n = torch.full((len(grid),), length)
    loss = orpo_loss(chosen, rejected, n, n, lambda_coef=0.25)
    loss.sum().backward()
    assert loss.dtype == dtype
    assert loss.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


@pytest.mark.parametrize("logp", [0.0, -1e-12, -0.5, -1e4])
def test_equal_completions_cost_log_two(logp):
    x = torch.tensor([logp], dtype=torch.float64)
    loss = orpo_loss(x, x.clone(), torch.tensor([1]), torch.tensor([1]), lambda_coef=0.5)
    assert loss.item() == pytest.approx(-logp + 0.5 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("certain", [0.0, -1e-12])
def test_certainty_is_rewarded_for_the_chosen_and_punished_for_the_rejected(certain):
    certain, other = torch.tensor([certain], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    one = torch.tensor([1])
    assert orpo_loss(certain, other, one, one, lambda_coef=1.0).item() < 1e-6
    assert orpo_loss(other, certain, one, one, lambda_coef=1.0).item() > 1 + 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
def test_dtype_follows_the_logps(dtype, integer):
    assert orpo_loss(*inputs(dtype), *lengths(integer), lambda_coef=0.25).dtype == dtype


GOOD = {
    "chosen_logp": -torch.ones(3),
    "rejected_logp": -torch.ones(3),
    "chosen_length": torch.ones(3).long(),
    "rejected_length": torch.ones(3).long(),
    "lambda_coef": 0.25,
}


@pytest.mark.parametrize("name", ["chosen_logp", "rejected_logp"])
@pytest.mark.parametrize("bad", [-torch.ones(3).long(), torch.ones(3).bool(), torch.tensor([-1.0, math.nan, -1.0])])
def test_bad_logps_are_named(name, bad):
    with pytest.raises(ValueError, match=name):
        orpo_loss(**{**GOOD, name: bad})


@pytest.mark.parametrize("name", ["rejected_logp", "chosen_length", "rejected_length"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2,)])
def test_nothing_broadcasts(name, shape):
    with pytest.raises(ValueError, match=name):
        orpo_loss(**{**GOOD, name: GOOD[name][0].expand(shape)})


@pytest.mark.parametrize("name", ["chosen_length", "rejected_length"])
@pytest.mark.parametrize("bad", [torch.ones(3), torch.tensor([1, 0, 2]), torch.tensor([1, -1, 2])])
def test_bad_lengths_are_named(name, bad):
    with pytest.raises(ValueError, match=name):
        orpo_loss(**{**GOOD, name: bad})


@pytest.mark.parametrize("bad", [-0.1, math.inf, math.nan, "0.1"])
def test_bad_lambda_coef_is_named_by_the_function_and_by_the_objective(bad):
    message = f"lambda_coef must be .*, got {re.escape(repr(bad))}"
    with pytest.raises(ValueError, match=message):
        orpo_loss(**{**GOOD, "lambda_coef": bad})
    with pytest.raises(ValueError, match=message):
        ORPO(lambda_coef=bad)


def test_objective_pairs_the_halves():
    chosen, rejected = inputs()
    logp, length = torch.cat([chosen, rejected]), torch.cat(lengths())
    nan = torch.full_like(logp, math.nan)  # ORPO has no reference: it must read nothing but logp and length
    scores = CompletionLogps(nan, logp=logp, length=length, token_logp=nan, ref_logp=nan, token_logratio=nan)
    objective = ORPO(lambda_coef=0.7)
    expected = orpo_loss(chosen, rejected, *lengths(), lambda_coef=0.7)
    assert torch.equal(objective.losses(scores, None, None), expected)
    assert ORPO() == ORPO(lambda_coef=0.25)
    assert not objective.needs_reference
    rewards = objective.rewards(scores)
    assert rewards is None or (rewards.shape == (12,) and rewards.isfinite().all() and not rewards.requires_grad)


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.losses.orpo"))
    assert result.attempted
    assert not result.failed
