"""Expected numbers are derived by hand: Zhao et al. 2023 (SLiC-HF), calibration loss and regularizer, with the chosen
completion as the regularizer's target. The kink itself is left to the implementation."""

from __future__ import annotations

import doctest
import importlib
import math
import re

import pytest
import torch

from halos_pl.batch import CompletionLogps
from halos_pl.losses import SLiC, slic_loss

# gaps ℓ_w − ℓ_l: 8, −39, 0, 0.5, −0.5, 1.5
CHOSEN, REJECTED = [-3.0, -41.0, -0.5, -8.0, -7.5, -2.0], [-11.0, -2.0, -0.5, -8.5, -7.0, -3.5]


def inputs(dtype=torch.float64):
    return tuple(torch.tensor(x, dtype=dtype, requires_grad=True) for x in (CHOSEN, REJECTED))


@pytest.mark.parametrize("beta", [0.2, 1.0, 9.0])
@pytest.mark.parametrize("lambda_coef", [0.0, 0.1, 2.5])
def test_losses_and_gradients_by_hand(beta, lambda_coef):
    chosen, rejected = inputs()
    loss = slic_loss(chosen, rejected, beta=beta, lambda_coef=lambda_coef)
    loss.sum().backward()
    pairs = list(zip(CHOSEN, REJECTED, strict=True))
    assert loss.tolist() == pytest.approx([max(0, beta - c + r) - lambda_coef * c for c, r in pairs], rel=1e-12)
    inside = [float(c - r < beta) for c, r in pairs]
    assert chosen.grad.tolist() == pytest.approx([-x - lambda_coef for x in inside], rel=1e-12)
    assert rejected.grad.tolist() == inside


def test_a_margin_that_is_met_leaves_only_the_regularizer():
    chosen, rejected = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-4.0, -9.0))
    loss = slic_loss(chosen, rejected, beta=1.0, lambda_coef=0.25)
    loss.sum().backward()
    assert (loss.item(), chosen.grad.item(), rejected.grad.item()) == (1.0, -0.25, 0.0)


def test_finite_differences():
    assert torch.autograd.gradcheck(lambda c, r: slic_loss(c, r, beta=1.0, lambda_coef=0.3), inputs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logps_stay_finite(dtype):
    chosen = torch.tensor([0.0, -1e4, -1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1e4, 0.0, -1e4], dtype=dtype, requires_grad=True)
    loss = slic_loss(chosen, rejected, beta=1.0, lambda_coef=0.5)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 15001.0, 5001.0]
    assert chosen.grad.tolist() == [-0.5, -1.5, -1.5]
    assert rejected.grad.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_stays(dtype):
    assert slic_loss(*inputs(dtype), beta=1.0, lambda_coef=0.1).dtype == dtype


GOOD = {"chosen_logp": torch.zeros(3), "rejected_logp": torch.zeros(3), "beta": 1.0, "lambda_coef": 0.1}


@pytest.mark.parametrize("name", ["chosen_logp", "rejected_logp"])
@pytest.mark.parametrize("bad", [torch.zeros(3).long(), torch.zeros(3).bool(), torch.tensor([0.0, math.nan, 1.0])])
def test_bad_logps_are_named(name, bad):
    with pytest.raises(ValueError, match=name):
        slic_loss(**{**GOOD, name: bad})


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2,)])
def test_nothing_broadcasts(shape):
    with pytest.raises(ValueError, match="rejected_logp"):
        slic_loss(**{**GOOD, "rejected_logp": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("name", "bad"),
    [("beta", x) for x in (0.0, -0.1, math.inf, math.nan, "1")]
    + [("lambda_coef", x) for x in (-0.1, math.inf, math.nan)],
)
def test_bad_numbers_are_named_by_the_function_and_by_the_objective(name, bad):
    message = f"{name} must be .*, got {re.escape(repr(bad))}"
    with pytest.raises(ValueError, match=message):
        slic_loss(**{**GOOD, name: bad})
    with pytest.raises(ValueError, match=message):
        SLiC(**{name: bad})


def test_objective_pairs_the_halves():
    chosen, rejected = inputs()
    logp = torch.cat([chosen, rejected])
    nan = torch.full_like(logp, math.nan)  # SLiC must read nothing but logp
    zero = torch.zeros(12, dtype=torch.int64)
    scores = CompletionLogps(nan, logp=logp, length=zero, token_logp=nan, ref_logp=nan, token_logratio=nan)
    objective = SLiC(beta=0.7, lambda_coef=0.3)
    expected = slic_loss(chosen, rejected, beta=0.7, lambda_coef=0.3)
    assert torch.equal(objective.losses(scores, None, None), expected)
    assert SLiC() == SLiC(beta=1.0, lambda_coef=0.1)
    assert not objective.needs_reference
    rewards = objective.rewards(scores)
    assert rewards is None or (rewards.shape == (12,) and rewards.isfinite().all() and not rewards.requires_grad)


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.losses.slic"))
    assert result.attempted
    assert not result.failed
