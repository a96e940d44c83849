"""Expected numbers are derived by hand: KTO report, equation 4, with the math module in float64."""

from __future__ import annotations

import doctest
import importlib
import math
import re

import pytest
import torch

from halos_pl.batch import CompletionLogps
from halos_pl.losses import DPO, dpo_loss

CHOSEN, REJECTED = [3.0, -1.0, 0.5, -8.0], [1.0, 2.0, 0.5, -30.0]


def inputs(dtype=torch.float64):
    return tuple(torch.tensor(x, dtype=dtype, requires_grad=True) for x in (CHOSEN, REJECTED))


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_losses_and_gradients_by_hand(beta):
    chosen, rejected = inputs()
    loss = dpo_loss(chosen, rejected, beta=beta)
    loss.sum().backward()
    margins = [beta * (c - r) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-m)) for m in margins], rel=1e-12)
    slopes = [-beta / (1 + math.exp(m)) for m in margins]  # −β·σ(−βΔ)
    assert chosen.grad.tolist() == pytest.approx(slopes, rel=1e-12)
    assert rejected.grad.tolist() == pytest.approx([-x for x in slopes], rel=1e-12)


def test_policy_equal_to_reference():
    zero = torch.zeros(2, dtype=torch.float64)
    assert dpo_loss(zero, zero, beta=0.1).tolist() == [pytest.approx(math.log(2), rel=1e-15)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logratios_stay_finite(dtype):
    chosen = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    loss = dpo_loss(chosen, -chosen.detach(), beta=1.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 2e4]
    assert chosen.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_stays(dtype):
    assert dpo_loss(*inputs(dtype), beta=0.1).dtype == dtype


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (torch.zeros(3), torch.zeros(3, 1), "rejected_logratio must be [3] like chosen_logratio, got [3, 1]"),
        (torch.zeros(3), torch.zeros(()), "rejected_logratio must be [3] like chosen_logratio, got []"),
        (torch.zeros(3).long(), torch.zeros(3), "chosen_logratio must be floating point, got torch.int64"),
        (torch.zeros(3), torch.zeros(3).bool(), "rejected_logratio must be floating point, got torch.bool"),
    ],
)
def test_bad_tensors_are_named(chosen, rejected, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dpo_loss(chosen, rejected, beta=0.1)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan, "0.1"])
def test_bad_beta_is_named_by_the_function_and_by_the_objective(beta):
    message = re.escape(f"beta must be a finite number > 0, got {beta!r}")
    with pytest.raises(ValueError, match=message):
        dpo_loss(torch.zeros(1), torch.zeros(1), beta=beta)
    with pytest.raises(ValueError, match=message):
        DPO(beta)


def test_objective_pairs_the_halves():
    chosen, rejected = inputs()
    logratio = torch.cat([chosen, rejected])
    nan = torch.full_like(logratio, math.nan)  # DPO must read nothing but the log-ratio
    scores = CompletionLogps(logratio, logp=nan, length=nan, token_logp=nan)
    assert torch.equal(DPO(0.4).losses(scores, None, None), dpo_loss(chosen, rejected, beta=0.4))
    rewards = DPO(0.4).rewards(scores)
    assert rewards.tolist() == pytest.approx([0.4 * x for x in CHOSEN + REJECTED])
    assert not rewards.requires_grad


def test_objective_needs_an_even_number_of_rows():
    odd = torch.zeros(3)
    with pytest.raises(ValueError, match="even number of rows, got 3"):
        DPO().losses(CompletionLogps(odd, odd, odd, odd), None, None)


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.losses.dpo"))
    assert result.attempted
    assert not result.failed
