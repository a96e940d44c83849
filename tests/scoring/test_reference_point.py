"""z0: a global mean, clamped after it, detached. Uneven ranks: tests/test_two_ranks.py."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from halos_pl.scoring import global_mean, reference_point


@pytest.mark.parametrize(
    ("ratios", "mean"),
    [
        ([2.0, -1.0, -1.0, 4.0], 1.0),  # a mean of clamped terms would be 1.5
        ([3.0, 0.0, 0.0], 1.0),  # true zeros count: without them it would be 3
        ([-3.0, 1.0], -1.0),
        ([0.0, 0.0], 0.0),
        ([], 0.0),
    ],
)
def test_mean_then_clamp(ratios: list[float], mean: float) -> None:
    values = torch.tensor(ratios, dtype=torch.float64)
    assert global_mean(values) == mean
    assert reference_point(values) == max(0.0, mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("f", [global_mean, reference_point])
def test_scalar_in_the_dtype_of_its_input_and_detached(f, dtype) -> None:
    ratios = torch.tensor([0.5, 1.5], dtype=dtype, requires_grad=True)
    z0 = f(ratios * 2)
    assert z0.shape == ()
    assert z0.dtype == dtype
    assert not z0.requires_grad
    assert z0 == 2


def test_summed_wider_than_float32() -> None:
    ratios = torch.tensor([1e8, 1.0, -1e8, 3.0])
    assert global_mean(ratios) == 1.0


def test_other_shapes_are_refused() -> None:
    for shape in ((), (2, 3)):
        with pytest.raises(ValueError, match=r"must have shape \[M\], got"):
            reference_point(torch.zeros(shape))


def test_docstring_examples() -> None:
    result = doctest.testmod(importlib.import_module("halos_pl.scoring.reference_point"))
    assert result.attempted
    assert not result.failed
