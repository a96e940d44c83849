"""Expected numbers are derived by hand: KTO report, equations 6 to 8, with the math module in float64."""

from __future__ import annotations

import doctest
import importlib
import math
import re
from typing import get_args

import pytest
import torch

from halos_pl.batch import CompletionLogps
from halos_pl.losses import KTO, APOZero, kto_loss
from halos_pl.losses.kto import ValueName

VALUES = get_args(ValueName)
R = [-7.0, -0.4, 0.0, 0.3, 2.0, 9.0]
DESIRABLE = [True, False, True, False, False, True]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def value_and_slope(name: str, x: float, alpha: float, loss_aversion: float) -> tuple[float, float]:
    if name == "logistic":
        return sigmoid(x), sigmoid(x) * sigmoid(-x)
    if name == "log_logistic":
        return min(x, 0) - math.log1p(math.exp(-abs(x))), sigmoid(-x)
    if name == "identity":
        return x, 1.0
    side = 1.0 if x >= 0 else loss_aversion
    if abs(x) < 1e-3:
        return side * x * 1e-3 ** (alpha - 1), side * 1e-3 ** (alpha - 1)
    return math.copysign(side * abs(x) ** alpha, x), side * alpha * abs(x) ** (alpha - 1)


def truth(r, desirable, z0, *, beta, weights=(1.0, 1.0), value="logistic", alpha=0.88, loss_aversion=2.25):
    """loss = λ·(c − v(s·β·(r − z0))), d loss/d r = −λ·s·β·v′."""
    s, weight = (1, weights[0]) if desirable else (-1, weights[1])
    v, slope = value_and_slope(value, s * beta * (r - z0), alpha, loss_aversion)
    return weight * ((value == "logistic") - v), -weight * s * beta * slope


def inputs(r=R, desirable=DESIRABLE, dtype=torch.float64):
    return torch.tensor(r, dtype=dtype, requires_grad=True), torch.tensor(desirable)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("z0", [0.0, 1.3])
@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.25)])
def test_losses_and_gradients_by_hand(value, z0, beta, weights):
    r, desirable = inputs()
    options = {"alpha": 0.6, "loss_aversion": 1.7, "value": value, "beta": beta}
    loss = kto_loss(
        r, desirable, torch.tensor(z0), desirable_weight=weights[0], undesirable_weight=weights[1], **options
    )
    loss.sum().backward()
    z0 = float(torch.tensor(z0))
    expected = [truth(x, d, z0, weights=weights, **options) for x, d in zip(R, DESIRABLE, strict=True)]
    assert loss.tolist() == pytest.approx([e[0] for e in expected], rel=1e-12, abs=1e-15)
    assert r.grad.tolist() == pytest.approx([e[1] for e in expected], rel=1e-12)


def test_one_reference_point_per_example():
    r, desirable = inputs()
    z0 = [0.0, 1.0, 0.5, 2.0, 0.1, 3.0]
    loss = kto_loss(r, desirable, torch.tensor(z0, dtype=torch.float64), beta=0.2)
    expected = [truth(x, d, z, beta=0.2)[0] for x, d, z in zip(R, DESIRABLE, z0, strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_policy_equal_to_reference():
    r, desirable = inputs([0.0, 0.0], [True, False])
    loss = kto_loss(r, desirable, 0.0, beta=0.1, desirable_weight=1.2, undesirable_weight=0.6)
    loss.sum().backward()
    assert loss.tolist() == [0.6, 0.3]
    assert r.grad.tolist() == pytest.approx([-1.2 * 0.1 / 4, 0.6 * 0.1 / 4])


@pytest.mark.parametrize("value", VALUES)
def test_a_higher_reference_point_raises_the_loss_of_the_desirable_and_lowers_the_others(value):
    r, desirable = inputs()
    low, high = (kto_loss(r, desirable, z0, beta=0.3, value=value) for z0 in (0.0, 2.0))
    assert torch.equal(high > low, desirable)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logratios_stay_finite(value, dtype):
    r, desirable = inputs([1e4, 1e4, -1e4, -1e4], [True, False] * 2, dtype)
    loss = kto_loss(r, desirable, 0.0, beta=1.0, value=value)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert r.grad.isfinite().all()
    if value == "logistic":
        assert loss.tolist() == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_follows_the_logratio(dtype):
    r, desirable = inputs(dtype=dtype)
    for z0 in (0.5, torch.tensor(0.5, dtype=torch.float64), torch.full((6,), 0.5, dtype=torch.float64)):
        assert kto_loss(r, desirable, z0, beta=0.1).dtype == dtype


def test_gradients_flow_through_an_attached_reference_point():
    r, desirable = inputs()
    z0 = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    kto_loss(r, desirable, z0, beta=0.1).sum().backward()
    assert z0.grad.item() == pytest.approx(-r.grad.sum().item())


GOOD = {"logratio": torch.zeros(3), "desirable": torch.ones(3, dtype=torch.bool), "z0": torch.tensor(0.0), "beta": 0.1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"logratio": torch.zeros(3, dtype=torch.int64)}, "logratio must be floating point, got torch.int64"),
        ({"logratio": torch.zeros(3, 1)}, "desirable must be bool [3, 1] like logratio, got torch.bool [3]"),
        ({"desirable": torch.ones(3, 1).bool()}, "desirable must be bool [3] like logratio, got torch.bool [3, 1]"),
        ({"desirable": torch.ones(1).bool()}, "desirable must be bool [3] like logratio, got torch.bool [1]"),
        ({"desirable": torch.ones(3)}, "desirable must be bool [3] like logratio, got torch.float32 [3]"),
        ({"desirable": torch.ones(3).long()}, "desirable must be bool [3] like logratio, got torch.int64 [3]"),
        ({"z0": torch.zeros(3, 1)}, "z0 must be floating point, 0-d or [3] like logratio, got torch.float32 [3, 1]"),
        ({"z0": torch.zeros(1)}, "z0 must be floating point, 0-d or [3] like logratio, got torch.float32 [1]"),
        ({"z0": torch.tensor(0)}, "z0 must be floating point, 0-d or [3] like logratio, got torch.int64 []"),
        ({"logratio": torch.tensor([0.0, math.nan, 1.0])}, "logratio"),
        ({"z0": torch.tensor(math.nan)}, "z0"),
        ({"z0": torch.tensor([0.0, 1.0, math.nan])}, "z0"),
    ],
)
def test_bad_tensors_are_named(bad, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kto_loss(**{**GOOD, **bad})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"beta": 0.0}, "beta must be a finite number > 0, got 0.0"),
        ({"beta": math.inf}, "beta must be a finite number > 0, got inf"),
        ({"beta": "0.1"}, "beta must be a finite number > 0, got '0.1'"),
        ({"desirable_weight": -1.0}, "desirable_weight must be a finite number >= 0, got -1.0"),
        ({"undesirable_weight": math.nan}, "undesirable_weight must be a finite number >= 0, got nan"),
        (
            {"value": "sigmoid"},
            "value must be one of logistic, log_logistic, identity, kahneman_tversky, got 'sigmoid'",
        ),
        ({"alpha": 0.0}, "alpha must be in (0, 1], got 0.0"),
        ({"alpha": 1.5}, "alpha must be in (0, 1], got 1.5"),
        ({"loss_aversion": 0.0}, "loss_aversion must be a finite number > 0, got 0.0"),
    ],
)
def test_bad_numbers_are_named_by_the_function_and_by_the_objective(bad, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kto_loss(**{**GOOD, **bad})
    with pytest.raises(ValueError, match=re.escape(message)):
        KTO(**bad)


def scores(logratio: torch.Tensor) -> CompletionLogps:
    """Every field but the log-ratio is poisoned: KTO must not read it."""
    nan = torch.full_like(logratio, math.nan)
    return CompletionLogps(logratio, logp=nan, length=nan, token_logp=nan, ref_logp=nan, token_logratio=nan)


def test_objective_hands_every_field_to_the_loss():
    r, desirable = inputs()
    z0 = torch.tensor(0.8)
    fields = {"beta": 0.3, "desirable_weight": 1.4, "undesirable_weight": 0.7, "value": "kahneman_tversky"}
    fields |= {"alpha": 0.5, "loss_aversion": 3.0}
    assert torch.equal(KTO(**fields).losses(scores(r), desirable, z0), kto_loss(r, desirable, z0, **fields))
    assert torch.equal(KTO().losses(scores(r), desirable, z0), kto_loss(r, desirable, z0, beta=0.1))
    rewards = KTO(beta=0.3).rewards(scores(r))
    assert rewards.tolist() == pytest.approx([0.3 * x for x in R])
    assert not rewards.requires_grad


def test_objective_without_a_reference_point():
    r, desirable = inputs()
    objective = KTO(reference_point=False)
    assert KTO().reference_point_from == "mismatched"
    assert objective.reference_point_from == "none"
    assert torch.equal(objective.losses(scores(r), desirable, None), kto_loss(r, desirable, 0.0, beta=0.1))


def test_objective_refuses_what_it_would_have_to_ignore_or_guess():
    r, desirable = inputs()
    with pytest.raises(ValueError, match=r"desirable must be .* for KTO, got None"):
        KTO().losses(scores(r), None, torch.tensor(0.0))
    with pytest.raises(ValueError, match="z0 must be a tensor with reference_point=True, got None"):
        KTO().losses(scores(r), desirable, None)
    with pytest.raises(ValueError, match="z0 must be None with reference_point=False"):
        KTO(reference_point=False).losses(scores(r), desirable, torch.tensor(0.0))
    with pytest.raises(ValueError, match="reference_point must be true or false, got 'no'"):
        KTO(reference_point="no")


def test_apo_zero_by_hand():
    """D'Oosterlinck et al. 2024, equation 7 (TRL, `loss_type="apo_zero"`): KTO with the reference point at zero."""
    r, desirable = inputs()
    objective = APOZero(beta=0.3, desirable_weight=1.5, undesirable_weight=0.25)
    loss = objective.losses(scores(r), desirable, None)
    loss.sum().backward()
    for i, got in enumerate((loss, r.grad)):
        expected = [truth(x, d, 0, beta=0.3, weights=(1.5, 0.25))[i] for x, d in zip(R, DESIRABLE, strict=True)]
        assert got.tolist() == pytest.approx(expected, rel=1e-12)
    assert APOZero() == APOZero(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
    assert objective.reference_point_from == "none"
    rewards = objective.rewards(scores(r))
    assert rewards.tolist() == pytest.approx([0.3 * x for x in R])
    assert not rewards.requires_grad
    with pytest.raises(ValueError, match="z0 must be None with reference_point=False"):
        objective.losses(scores(r), desirable, torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"beta must be a finite number > 0, got -1\.0"):
        APOZero(beta=-1.0)
    for other in ({"reference_point": True}, {"value": "identity"}):
        with pytest.raises(ValueError, match="APOZero has no reference point and the logistic value, got "):
            APOZero(**other)


@pytest.mark.parametrize("reference_point", [True, False])
def test_a_human_value_of_ones_own_keeps_weights_and_reference_point(reference_point):
    class Arctan(KTO):
        @property
        def human_value(self):
            return torch.atan

    r, desirable = inputs()
    z0 = torch.tensor(0.75, dtype=torch.float64) if reference_point else None
    objective = Arctan(beta=0.3, desirable_weight=1.5, undesirable_weight=0.25, reference_point=reference_point)
    loss = objective.losses(scores(r), desirable, z0)
    point = 0.75 if reference_point else 0.0
    sides = [(1.5, 0.3) if d else (0.25, -0.3) for d in DESIRABLE]
    by_hand = [-weight * math.atan(beta * (x - point)) for x, (weight, beta) in zip(R, sides, strict=True)]
    assert loss.tolist() == pytest.approx(by_hand, rel=1e-12)


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.losses.kto"))
    assert result.attempted
    assert not result.failed
