"""Expected numbers are derived by hand with the math module in float64: KTO report, equation 4, and for CDPO Mitchell's
"A note on DPO with noisy preferences" (TRL, `loss_type="sigmoid"` with `label_smoothing`)."""

from __future__ import annotations

import doctest
import importlib
import math
import re

import pytest
import torch

from halos_pl.batch import CompletionLogps
from halos_pl.losses import CDPO, DPO, cdpo_loss, dpo_loss

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


@pytest.mark.parametrize("beta", [0.1, 0.9])
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.4])
def test_cdpo_by_hand(beta, epsilon):
    """−log σ(−m) = m − log σ(m), so the loss is log(1 + e⁻ᵐ) + ε·m and its slope in m is ε − σ(−m)."""
    chosen, rejected = inputs()
    loss = cdpo_loss(chosen, rejected, beta=beta, epsilon=epsilon)
    loss.sum().backward()
    margins = [beta * (c - r) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    expected = [math.log1p(math.exp(-m)) + epsilon * m for m in margins]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    slopes = [beta * (epsilon - 1 / (1 + math.exp(m))) for m in margins]
    assert chosen.grad.tolist() == pytest.approx(slopes, rel=1e-12)
    assert rejected.grad.tolist() == pytest.approx([-x for x in slopes], rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.1, 0.25])
def test_cdpo_is_least_where_the_policy_believes_the_label_as_much_as_told(epsilon):
    """At σ(βΔ) = 1 − ε the gradient vanishes and the loss is the entropy of the noise."""
    margin = torch.tensor([math.log((1 - epsilon) / epsilon)], dtype=torch.float64, requires_grad=True)
    loss = cdpo_loss(margin, torch.zeros_like(margin), beta=1.0, epsilon=epsilon)
    loss.sum().backward()
    entropy = -epsilon * math.log(epsilon) - (1 - epsilon) * math.log(1 - epsilon)
    assert loss.item() == pytest.approx(entropy, rel=1e-12)
    assert margin.grad.item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cdpo_stays_finite(dtype):
    chosen = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    loss = cdpo_loss(chosen, -chosen.detach(), beta=1.0, epsilon=0.25)
    loss.sum().backward()
    assert loss.tolist() == [5e3, 1.5e4]
    assert chosen.grad.tolist() == [0.25, -0.75]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cdpo_dtype_stays(dtype):
    assert cdpo_loss(*inputs(dtype), beta=0.1, epsilon=0.1).dtype == dtype


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (torch.zeros(3), torch.zeros(1), "rejected_logratio must be [3] like chosen_logratio, got [1]"),
        (torch.zeros(3).long(), torch.zeros(3), "chosen_logratio must be floating point, got torch.int64"),
        (torch.tensor([0.0, math.nan]), torch.zeros(2), "chosen_logratio"),
        (torch.zeros(2), torch.tensor([0.0, math.nan]), "rejected_logratio"),
    ],
)
def test_cdpo_names_bad_tensors(chosen, rejected, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cdpo_loss(chosen, rejected, beta=0.1, epsilon=0.1)


@pytest.mark.parametrize(
    ("name", "bad"),
    [("beta", x) for x in (0.0, -0.1, math.inf, math.nan)]
    + [("epsilon", x) for x in (-0.01, 0.5, 1.0, math.inf, math.nan)],
)
def test_cdpo_names_bad_numbers(name, bad):
    message = f"{name} must be .*, got {re.escape(repr(bad))}"
    with pytest.raises(ValueError, match=message):
        cdpo_loss(torch.zeros(1), torch.zeros(1), **{"beta": 0.1, "epsilon": 0.1, name: bad})
    with pytest.raises(ValueError, match=message):
        CDPO(**{name: bad})


def test_cdpo_objective():
    chosen, rejected = inputs()
    logratio = torch.cat([chosen, rejected])
    nan = torch.full_like(logratio, math.nan)
    scores = CompletionLogps(logratio, logp=nan, length=torch.zeros(8).long(), token_logp=nan, ref_logp=nan)
    losses = CDPO(beta=0.4, epsilon=0.3).losses(scores, None, None)
    assert torch.equal(losses, cdpo_loss(chosen, rejected, beta=0.4, epsilon=0.3))
    assert CDPO() == CDPO(beta=0.1, epsilon=0.1)
    rewards = CDPO(beta=0.4).rewards(scores)
    assert rewards.tolist() == pytest.approx([0.4 * x for x in CHOSEN + REJECTED])
    assert not rewards.requires_grad


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.losses.dpo"))
    assert result.attempted
    assert not result.failed
