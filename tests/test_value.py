from __future__ import annotations

import doctest
import importlib
import math
import re

import pytest
import torch

from halos_pl.value import VALUE_FUNCTIONS, implied_value, kahneman_tversky


def truth(z: float, z0: float, alpha: float, loss_aversion: float) -> tuple[float, float]:
    """Value and slope: equation 6, and its chord within 10⁻³ of z0."""
    x = z - z0
    side = 1.0 if x >= 0 else loss_aversion
    if abs(x) < 1e-3:
        return side * x * 1e-3 ** (alpha - 1), side * 1e-3 ** (alpha - 1)
    return math.copysign(side * abs(x) ** alpha, x), side * alpha * abs(x) ** (alpha - 1)


@pytest.mark.parametrize(("alpha", "loss_aversion"), [(0.88, 2.25), (0.5, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("z0", [0.0, 0.7])
def test_equation_6_and_its_slope(z0, alpha, loss_aversion):
    xs = [-1e4, -30.0, -1.0, -0.0011, -0.0009, 0.0, 0.0009, 0.0011, 0.5, 1.0, 30.0, 1e4]
    z = torch.tensor([z0 + x for x in xs], dtype=torch.float64, requires_grad=True)
    v = kahneman_tversky(z, z0, alpha=alpha, loss_aversion=loss_aversion)
    v.sum().backward()
    expected = [truth(x, z0, alpha, loss_aversion) for x in z.tolist()]
    assert v.tolist() == pytest.approx([e[0] for e in expected], rel=1e-12)
    assert z.grad.tolist() == pytest.approx([e[1] for e in expected], rel=1e-12)


def test_losses_loom_larger_than_gains():
    z = torch.tensor([-3.0, 3.0], dtype=torch.float64)
    loss, gain = kahneman_tversky(z)
    assert -loss / gain == pytest.approx(2.25)


def test_continuous_and_learnable_where_training_starts():
    edge = torch.tensor([-1e-3, 1e-3], dtype=torch.float64)
    inside, outside = kahneman_tversky(edge * (1 - 1e-9)), kahneman_tversky(edge * (1 + 1e-9))
    torch.testing.assert_close(inside, outside, rtol=1e-8, atol=0)
    z = torch.zeros(1, requires_grad=True)
    v = kahneman_tversky(z)
    v.backward()
    assert v.item() == 0
    assert z.grad.item() == pytest.approx(1e-3**-0.12)


def test_reference_point_may_be_a_number_0d_or_one_an_outcome():
    z = torch.tensor([1.0, 2.0])
    expected = kahneman_tversky(z - 0.5)
    for z0 in (0.5, torch.tensor(0.5), torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5], dtype=torch.float64)):
        assert torch.equal(kahneman_tversky(z, z0), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_stays(dtype):
    assert kahneman_tversky(torch.ones(2, dtype=dtype), torch.tensor(0.5)).dtype == dtype


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"z": torch.tensor([1])}, "z must be floating point, got torch.int64"),
        ({"z0": torch.zeros(2, 1)}, "z0 must be 0-d or [2] like z, got [2, 1]"),
        ({"alpha": 0.0}, "alpha must be in (0, 1], got 0.0"),
        ({"alpha": 1.1}, "alpha must be in (0, 1], got 1.1"),
        ({"loss_aversion": 0.0}, "loss_aversion must be a finite number > 0, got 0.0"),
        ({"loss_aversion": math.nan}, "loss_aversion must be a finite number > 0, got nan"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kahneman_tversky(**{"z": torch.zeros(2), **kwargs})


def implied_truth(name: str, z: float, beta: float) -> tuple[float, float]:
    """Value and slope of the formulas in the KTO report, by hand."""
    x = beta * z
    sigmoid = 1 / (1 + math.exp(-x))
    return {
        "rlhf": (x, beta),
        "dpo": (-math.log1p(math.exp(-x)), beta * (1 - sigmoid)),
        "slic": (min(0.0, z - beta), float(z < beta)),
        "ppo": (min(max(z, math.log(0.5)), math.log(2.0)), float(abs(z) < math.log(2.0))),
        "kto": (sigmoid, beta * sigmoid * (1 - sigmoid)),
        "kahneman_tversky": (
            x**0.88 if x >= 0 else -2.25 * (-x) ** 0.88,
            beta * (0.88 if x >= 0 else 2.25 * 0.88) * abs(x) ** -0.12,
        ),
    }[name]


# Off the kinks of every function and beta below, and off the chord of kahneman_tversky.
OUTCOMES = [-30.0, -3.0, -0.7, -0.69, -0.02, 0.02, 0.4, 0.69, 0.7, 1.1, 1.9, 2.1, 30.0]


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("name", VALUE_FUNCTIONS)
def test_implied_value_and_its_slope(name, beta):
    z = torch.tensor(OUTCOMES, dtype=torch.float64, requires_grad=True)
    v = implied_value(name, z, beta=beta)
    v.sum().backward()
    expected = [implied_truth(name, x, beta) for x in OUTCOMES]
    assert v.tolist() == pytest.approx([e[0] for e in expected], rel=1e-12)
    assert z.grad.tolist() == pytest.approx([e[1] for e in expected], rel=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_the_kinks_of_slic_and_ppo(beta):
    z = torch.tensor([beta - 1e-9, beta, beta + 1e-9], dtype=torch.float64)
    assert implied_value("slic", z, beta=beta).tolist() == pytest.approx([-1e-9, 0, 0], abs=1e-15)
    edges = torch.tensor([-0.7, math.log(0.5), math.log(2.0), 0.7], dtype=torch.float64)
    low, high = math.log(0.5), math.log(2.0)
    assert implied_value("ppo", edges, beta=beta).tolist() == pytest.approx([low, low, high, high], rel=1e-15)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rlhf", 0), ("dpo", -math.log(2)), ("slic", -1), ("ppo", 0), ("kto", 0.5), ("kahneman_tversky", 0)],
)
def test_implied_value_of_the_reference_point(name, value):
    assert implied_value(name, torch.zeros(1, dtype=torch.float64), beta=1.0).item() == pytest.approx(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", VALUE_FUNCTIONS)
def test_implied_value_far_out(name, dtype):
    z = torch.tensor([-1e4, 1e4], dtype=dtype, requires_grad=True)
    v = implied_value(name, z, beta=1.0)
    v.sum().backward()
    far = 1e4**0.88
    expected = {
        "rlhf": (-1e4, 1e4),
        "dpo": (-1e4, 0),
        "slic": (-10001, 0),
        "ppo": (math.log(0.5), math.log(2.0)),
        "kto": (0, 1),
        "kahneman_tversky": (-2.25 * far, far),
    }[name]
    assert v.tolist() == pytest.approx(expected, rel=1e-6)
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("name", VALUE_FUNCTIONS)
def test_implied_value_never_falls_and_is_concave_in_gains(name, beta):
    step = 2.0**-7
    z = torch.arange(-20, 20 + step, step, dtype=torch.float64)
    rises = implied_value(name, z, beta=beta).diff()
    assert (rises >= 0).all()
    assert (rises[z[:-1] >= 0].diff() <= 1e-14).all()


def test_who_is_loss_averse():
    z = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)
    averse = set()
    for name in VALUE_FUNCTIONS:
        loss, zero, gain = implied_value(name, z, beta=1.0).tolist()
        if zero - loss > gain - zero + 1e-12:
            averse.add(name)
    assert averse == {"dpo", "slic", "kahneman_tversky"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 1, 3)])
@pytest.mark.parametrize("name", VALUE_FUNCTIONS)
def test_implied_value_keeps_shape_and_dtype(name, shape, dtype):
    v = implied_value(name, torch.ones(shape, dtype=dtype), beta=0.5)
    assert v.shape == shape
    assert v.dtype == dtype


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "ipo"}, "name must be one of rlhf, dpo, slic, ppo, kto, kahneman_tversky, got 'ipo'"),
        ({"beta": 0.0}, "beta must be a finite number > 0, got 0.0"),
        ({"beta": -1.0}, "beta must be a finite number > 0, got -1.0"),
        ({"beta": math.nan}, "beta must be a finite number > 0, got nan"),
        ({"beta": math.inf}, "beta must be a finite number > 0, got inf"),
        ({"z": torch.tensor([1])}, "z must be floating point, got torch.int64"),
    ],
)
def test_implied_value_names_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        implied_value(**{"name": "kto", "z": torch.zeros(2), "beta": 1.0, **kwargs})


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.value"))
    assert result.attempted
    assert not result.failed
