"""Expected numbers are derived by hand: Azar et al. 2024, equation 17, of log-ratios per token, which its authors
confirmed to TRL as the form of their experiments (TRL, `loss_type="ipo"`)."""

from __future__ import annotations

import doctest
import importlib
import math
import re

import pytest
import torch

from halos_pl.batch import CompletionLogps
from halos_pl.losses import IPO, ipo_loss

CHOSEN, REJECTED = [3.0, -1.0, 0.5, -8.0, 7.0], [1.0, 2.0, 0.5, -30.0, -3.5]
CHOSEN_LENGTH, REJECTED_LENGTH = [1, 4, 7, 512, 2], [3, 1, 7, 100, 5]


def inputs(dtype=torch.float64):
    return tuple(torch.tensor(x, dtype=dtype, requires_grad=True) for x in (CHOSEN, REJECTED))


def lengths(dtype=torch.int64):
    return torch.tensor(CHOSEN_LENGTH, dtype=dtype), torch.tensor(REJECTED_LENGTH, dtype=dtype)


@pytest.mark.parametrize("tau", [0.1, 0.9])
def test_losses_and_gradients_by_hand(tau):
    chosen, rejected = inputs()
    loss = ipo_loss(chosen, rejected, *lengths(), tau=tau)
    loss.sum().backward()
    rows = list(zip(CHOSEN, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH, strict=True))
    gaps = [c / m - r / n - 1 / (2 * tau) for c, r, m, n in rows]
    assert loss.tolist() == pytest.approx([g * g for g in gaps], rel=1e-12)
    assert chosen.grad.tolist() == pytest.approx([2 * g / m for g, (_, _, m, _) in zip(gaps, rows, strict=True)])
    assert rejected.grad.tolist() == pytest.approx([-2 * g / n for g, (_, _, _, n) in zip(gaps, rows, strict=True)])


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_policy_equal_to_reference(tau):
    """(1/(2τ))², with gradient −1/(τ·len) for the chosen and +1/(τ·len) for the rejected."""
    chosen, rejected = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = ipo_loss(chosen, rejected, torch.tensor([1, 4]), torch.tensor([5, 2]), tau=tau)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1 / (4 * tau**2)] * 2, rel=1e-12)
    assert chosen.grad.tolist() == pytest.approx([-1 / tau, -1 / (4 * tau)], rel=1e-12)
    assert rejected.grad.tolist() == pytest.approx([1 / (5 * tau), 1 / (2 * tau)], rel=1e-12)


def test_least_where_the_gap_per_token_is_half_of_one_over_tau():
    chosen = torch.tensor([8.0], dtype=torch.float64, requires_grad=True)
    loss = ipo_loss(chosen, torch.tensor([-3.0]).double(), torch.tensor([2]), torch.tensor([3]), tau=0.1)  # 4 + 1 = 5
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-24)
    assert chosen.grad.item() == pytest.approx(0, abs=1e-12)


def test_finite_differences():
    assert torch.autograd.gradcheck(lambda c, r: ipo_loss(c, r, *lengths(), tau=0.3), inputs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logratios_stay_finite(dtype):
    chosen = torch.tensor([1e4, -1e4, 1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1e4, 1e4, 1e4], dtype=dtype, requires_grad=True)
    one = torch.ones(3, dtype=torch.int64)
    loss = ipo_loss(chosen, rejected, one, one, tau=0.5)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([19999.0**2, 20001.0**2, 1.0], rel=1e-6)
    assert chosen.grad.tolist() == pytest.approx([39998.0, -40002.0, -2.0], rel=1e-6)
    assert rejected.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
def test_dtype_follows_the_logratios(dtype, integer):
    assert ipo_loss(*inputs(dtype), *lengths(integer), tau=0.1).dtype == dtype


GOOD = {
    "chosen_logratio": torch.zeros(3),
    "rejected_logratio": torch.zeros(3),
    "chosen_length": torch.ones(3).long(),
    "rejected_length": torch.ones(3).long(),
    "tau": 0.1,
}


@pytest.mark.parametrize("name", ["chosen_logratio", "rejected_logratio"])
@pytest.mark.parametrize("bad", [torch.zeros(3).long(), torch.zeros(3).bool(), torch.tensor([0.0, math.nan, 1.0])])
def test_bad_logratios_are_named(name, bad):
    with pytest.raises(ValueError, match=name):
        ipo_loss(**{**GOOD, name: bad})


@pytest.mark.parametrize("name", ["rejected_logratio", "chosen_length", "rejected_length"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2,)])
def test_nothing_broadcasts(name, shape):
    with pytest.raises(ValueError, match=name):
        ipo_loss(**{**GOOD, name: torch.ones(shape, dtype=GOOD[name].dtype)})


@pytest.mark.parametrize("name", ["chosen_length", "rejected_length"])
@pytest.mark.parametrize("bad", [torch.ones(3), torch.tensor([1, 0, 2]), torch.tensor([1, -1, 2])])
def test_bad_lengths_are_named(name, bad):
    with pytest.raises(ValueError, match=name):
        ipo_loss(**{**GOOD, name: bad})


@pytest.mark.parametrize("tau", [0.0, -0.1, math.inf, math.nan, "0.1"])
def test_bad_tau_is_named_by_the_function_and_by_the_objective(tau):
    message = re.escape(f"tau must be a finite number > 0, got {tau!r}")
    with pytest.raises(ValueError, match=message):
        ipo_loss(**{**GOOD, "tau": tau})
    with pytest.raises(ValueError, match=message):
        IPO(tau)


def test_objective_pairs_the_halves():
    chosen, rejected = inputs()
    logratio, length = torch.cat([chosen, rejected]), torch.cat(lengths())
    nan = torch.full_like(logratio, math.nan)  # IPO must read nothing but log-ratios and lengths
    scores = CompletionLogps(logratio, logp=nan, length=length, token_logp=nan, ref_logp=nan, token_logratio=nan)
    assert torch.equal(IPO(0.4).losses(scores, None, None), ipo_loss(chosen, rejected, *lengths(), tau=0.4))
    assert IPO() == IPO(tau=0.1)
    rewards = IPO(0.4).rewards(scores)
    assert rewards is None or (rewards.shape == (10,) and rewards.isfinite().all() and not rewards.requires_grad)


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.losses.ipo"))
    assert result.attempted
    assert not result.failed
