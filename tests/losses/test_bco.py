"""Expected numbers are derived by hand with the math module in float64: Jung et al. 2024 (BCO), whose
reward shift δ is β·z0 here."""

from __future__ import annotations

import doctest
import importlib
import math
import re

import pytest
import torch

from halos_pl.batch import CompletionLogps
from halos_pl.losses import BCO, bco_loss

R = [-7.0, -0.4, 0.0, 0.3, 2.0, 9.0]
DESIRABLE = [True, False, True, False, False, True]


def truth(r, desirable, z0, beta, weights=(1.0, 1.0)):
    """loss = λ·log(1 + e⁻ᵍ) with g = s·β·(r − z0), d loss/d r = −λ·s·β·σ(−g)."""
    s, weight = (1, weights[0]) if desirable else (-1, weights[1])
    g = s * beta * (r - z0)
    return weight * math.log1p(math.exp(-g)), -weight * s * beta / (1 + math.exp(g))


def inputs(r=R, desirable=DESIRABLE, dtype=torch.float64):
    return torch.tensor(r, dtype=dtype, requires_grad=True), torch.tensor(desirable)


@pytest.mark.parametrize("z0", [0.0, 1.3, -2.0])
@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.25), (0.0, 2.0)])
@pytest.mark.parametrize("form", ["number", "0-d", "[B]"])
def test_losses_and_gradients_by_hand(z0, beta, weights, form):
    r, desirable = inputs()
    tensor = torch.tensor(z0, dtype=torch.float64)
    at = {"number": z0, "0-d": tensor, "[B]": tensor.expand(6)}[form]
    loss = bco_loss(r, desirable, at, beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
    loss.sum().backward()
    expected = [truth(x, d, z0, beta, weights) for x, d in zip(R, DESIRABLE, strict=True)]
    assert loss.tolist() == pytest.approx([e[0] for e in expected], rel=1e-12)
    assert r.grad.tolist() == pytest.approx([e[1] for e in expected], rel=1e-12)


def test_one_shift_per_example():
    r, desirable = inputs()
    z0 = [0.0, 1.0, -0.5, 2.0, 0.1, 3.0]
    loss = bco_loss(r, desirable, torch.tensor(z0, dtype=torch.float64), beta=0.2)
    expected = [truth(x, d, z, 0.2)[0] for x, d, z in zip(R, DESIRABLE, z0, strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_log_ratio_at_the_shift_costs_log_two():
    loss = bco_loss(*inputs([0.7, 0.7], [True, False]), 0.7, beta=0.3, undesirable_weight=1.5)
    assert loss.tolist() == pytest.approx([math.log(2), 1.5 * math.log(2)], rel=1e-15)


def test_finite_differences():
    r, desirable = inputs()
    assert torch.autograd.gradcheck(lambda x: bco_loss(x, desirable, 0.4, beta=0.7), (r,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logratios_stay_finite(dtype):
    r, desirable = inputs([1e4, 1e4, -1e4, -1e4], [True, False] * 2, dtype)
    loss = bco_loss(r, desirable, 0.0, beta=1.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1e4, 1e4, 0.0]
    assert r.grad.tolist() == [0.0, 1.0, -1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_follows_the_logratio(dtype):
    r, desirable = inputs(dtype=dtype)
    for z0 in (0.5, torch.tensor(0.5, dtype=torch.float64), torch.full((6,), 0.5, dtype=torch.float64)):
        assert bco_loss(r, desirable, z0, beta=0.1).dtype == dtype


GOOD = {"logratio": torch.zeros(3), "desirable": torch.ones(3, dtype=torch.bool), "z0": torch.tensor(0.0), "beta": 0.1}


@pytest.mark.parametrize(
    ("name", "bad"),
    [("logratio", torch.zeros(3).long()), ("logratio", torch.tensor([0.0, math.nan, 1.0]))]
    + [("desirable", x) for x in (torch.ones(3), torch.ones(3).long(), torch.ones(1).bool(), torch.ones(3, 1).bool())]
    + [("z0", x) for x in (torch.zeros(1), torch.zeros(3, 1), torch.tensor(0), torch.tensor(math.nan), math.nan)],
)
def test_bad_tensors_are_named(name, bad):
    with pytest.raises(ValueError, match=name):
        bco_loss(**{**GOOD, name: bad})


@pytest.mark.parametrize(
    ("name", "bad"),
    [("beta", x) for x in (0.0, -0.1, math.inf, math.nan, "0.1")]
    + [(name, x) for name in ("desirable_weight", "undesirable_weight") for x in (-1.0, math.inf, math.nan)],
)
def test_bad_numbers_are_named_by_the_function_and_by_the_objective(name, bad):
    message = f"(^|[^_]){name} must be .*, got {re.escape(repr(bad))}"
    with pytest.raises(ValueError, match=message):
        bco_loss(**{**GOOD, name: bad})
    with pytest.raises(ValueError, match=message):
        BCO(**{name: bad})


def test_objective():
    r, desirable = inputs()
    nan = torch.full_like(r, math.nan)  # BCO must read nothing but the log-ratio
    zero = torch.zeros(6, dtype=torch.int64)
    scores = CompletionLogps(r, logp=nan, length=zero, token_logp=nan, ref_logp=nan, token_logratio=nan)
    fields = {"beta": 0.4, "desirable_weight": 1.4, "undesirable_weight": 0.7}
    z0 = torch.tensor(0.8)
    assert torch.equal(BCO(**fields).losses(scores, desirable, z0), bco_loss(r, desirable, z0, **fields))
    assert torch.equal(BCO().losses(scores, desirable, z0), bco_loss(r, desirable, z0, beta=0.1))
    rewards = BCO(beta=0.4).rewards(scores)
    assert rewards.tolist() == pytest.approx([0.4 * x for x in R])
    assert not rewards.requires_grad
    assert BCO().reference_point_from == "running_mean"
    with pytest.raises(ValueError, match="desirable"):
        BCO().losses(scores, None, z0)
    with pytest.raises(ValueError, match="z0"):
        BCO().losses(scores, desirable, None)


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.losses.bco"))
    assert result.attempted
    assert not result.failed
