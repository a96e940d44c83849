"""Expected numbers are derived by hand: Meng et al. 2024, equation 6, with the math module in float64."""

from __future__ import annotations

import doctest
import importlib
import math
import re

import pytest
import torch

from halos_pl.batch import CompletionLogps
from halos_pl.losses import SimPO, simpo_loss

CHOSEN, REJECTED = [-3.0, -41.0, -0.5, -8.0, -700.0], [-11.0, -2.0, -0.5, -30.0, -3.5]
CHOSEN_LENGTH, REJECTED_LENGTH = [1, 4, 7, 512, 20], [3, 1, 7, 100, 5]


def inputs(dtype=torch.float64):
    return tuple(torch.tensor(x, dtype=dtype, requires_grad=True) for x in (CHOSEN, REJECTED))


def lengths(dtype=torch.int64):
    return torch.tensor(CHOSEN_LENGTH, dtype=dtype), torch.tensor(REJECTED_LENGTH, dtype=dtype)


@pytest.mark.parametrize("beta", [0.3, 2.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.6])
def test_losses_and_gradients_by_hand(beta, gamma):
    """TRL's `simpo` writes the margin as β·(logits − γ/β): the same number."""
    chosen, rejected = inputs()
    loss = simpo_loss(chosen, rejected, *lengths(), beta=beta, gamma=gamma)
    loss.sum().backward()
    rows = list(zip(CHOSEN, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH, strict=True))
    margins = [beta * ((c / m - r / n) - gamma / beta) for c, r, m, n in rows]
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-m)) for m in margins], rel=1e-12)
    slopes = [-beta / (1 + math.exp(m)) for m in margins]  # −β·σ(−margin)
    assert chosen.grad.tolist() == pytest.approx([s / n for s, n in zip(slopes, CHOSEN_LENGTH, strict=True)], rel=1e-12)
    expected = [-s / n for s, n in zip(slopes, REJECTED_LENGTH, strict=True)]
    assert rejected.grad.tolist() == pytest.approx(expected, rel=1e-12)


def test_equal_averages_cost_what_the_margin_asks():
    chosen, rejected = torch.tensor([-2.0]).double(), torch.tensor([-6.0]).double()
    loss = simpo_loss(chosen, rejected, torch.tensor([1]), torch.tensor([3]), beta=2.5, gamma=1.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(1.5)), rel=1e-12)


def test_finite_differences():
    chosen, rejected = ((x / 10).detach().requires_grad_() for x in inputs())
    assert torch.autograd.gradcheck(lambda c, r: simpo_loss(c, r, *lengths(), beta=2.0, gamma=1.0), (chosen, rejected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logps_stay_finite(dtype):
    chosen = torch.tensor([0.0, -1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1e4, 0.0], dtype=dtype, requires_grad=True)
    one = torch.ones(2, dtype=torch.int64)
    loss = simpo_loss(chosen, rejected, one, one, beta=2.0, gamma=1.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 20001.0]
    assert chosen.grad.tolist() == [0.0, -2.0]
    assert rejected.grad.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
def test_dtype_follows_the_logps(dtype, integer):
    assert simpo_loss(*inputs(dtype), *lengths(integer), beta=2.0, gamma=1.0).dtype == dtype


GOOD = {
    "chosen_logp": torch.zeros(3),
    "rejected_logp": torch.zeros(3),
    "chosen_length": torch.ones(3).long(),
    "rejected_length": torch.ones(3).long(),
    "beta": 2.0,
    "gamma": 1.0,
}


@pytest.mark.parametrize("name", ["chosen_logp", "rejected_logp"])
@pytest.mark.parametrize("bad", [torch.zeros(3).long(), torch.zeros(3).bool(), torch.tensor([0.0, math.nan, 1.0])])
def test_bad_logps_are_named(name, bad):
    with pytest.raises(ValueError, match=name):
        simpo_loss(**{**GOOD, name: bad})


@pytest.mark.parametrize("name", ["rejected_logp", "chosen_length", "rejected_length"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2,)])
def test_nothing_broadcasts(name, shape):
    with pytest.raises(ValueError, match=name):
        simpo_loss(**{**GOOD, name: torch.ones(shape, dtype=GOOD[name].dtype)})


@pytest.mark.parametrize("name", ["chosen_length", "rejected_length"])
@pytest.mark.parametrize("bad", [torch.ones(3), torch.tensor([1, 0, 2]), torch.tensor([1, -1, 2])])
def test_bad_lengths_are_named(name, bad):
    with pytest.raises(ValueError, match=name):
        simpo_loss(**{**GOOD, name: bad})


@pytest.mark.parametrize(
    ("name", "bad"),
    [("beta", x) for x in (0.0, -0.1, math.inf, math.nan, "2")] + [("gamma", x) for x in (-0.1, math.inf, math.nan)],
)
def test_bad_numbers_are_named_by_the_function_and_by_the_objective(name, bad):
    message = f"{name} must be .*, got {re.escape(repr(bad))}"
    with pytest.raises(ValueError, match=message):
        simpo_loss(**{**GOOD, name: bad})
    with pytest.raises(ValueError, match=message):
        SimPO(**{name: bad})


def test_objective_pairs_the_halves():
    chosen, rejected = inputs()
    logp, length = torch.cat([chosen, rejected]), torch.cat(lengths())
    nan = torch.full_like(logp, math.nan)  # SimPO has no reference: it must read nothing but logp and length
    scores = CompletionLogps(nan, logp=logp, length=length, token_logp=nan, ref_logp=nan, token_logratio=nan)
    expected = simpo_loss(chosen, rejected, *lengths(), beta=0.7, gamma=0.3)
    objective = SimPO(beta=0.7, gamma=0.3)
    assert torch.equal(objective.losses(scores, None, None), expected)
    assert SimPO() == SimPO(beta=2.0, gamma=1.0)
    assert not objective.needs_reference
    rewards = objective.rewards(scores)  # Meng et al., equation 4: the average log-probability, times β
    averages = zip(CHOSEN + REJECTED, CHOSEN_LENGTH + REJECTED_LENGTH, strict=True)
    assert rewards.tolist() == pytest.approx([0.7 * x / n for x, n in averages], rel=1e-12)
    assert not rewards.requires_grad


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.losses.simpo"))
    assert result.attempted
    assert not result.failed
