from __future__ import annotations

import doctest
import importlib
import math
import re

import pytest
import torch

from halos_pl.value import kahneman_tversky


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


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.value"))
    assert result.attempted
    assert not result.failed
