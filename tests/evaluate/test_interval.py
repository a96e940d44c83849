"""The exact interval against its definition, in whole numbers."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest

from halos_pl.evaluate import clopper_pearson


def at_least(k: int, n: int, p: float) -> float:
    """P(X ≥ k), exactly."""
    q = Fraction(p)
    return float(sum(comb(n, i) * q**i * (1 - q) ** (n - i) for i in range(k, n + 1)))


@pytest.mark.parametrize(
    ("k", "n", "confidence"), [(1, 2, 0.9), (3, 10, 0.9), (77, 150, 0.9), (9, 10, 0.5), (5, 40, 0.99)]
)
def test_each_end_leaves_half_of_the_rest_outside(k: int, n: int, confidence: float) -> None:
    low, high = clopper_pearson(k, n, confidence)
    assert low < k / n < high
    assert at_least(k, n, low) == pytest.approx((1 - confidence) / 2, abs=1e-9)
    assert 1 - at_least(k + 1, n, high) == pytest.approx((1 - confidence) / 2, abs=1e-9)
    assert clopper_pearson(n - k, n, confidence) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_none_and_all() -> None:
    assert clopper_pearson(0, 20) == pytest.approx((0.0, 1 - 0.05 ** (1 / 20)))
    assert clopper_pearson(20, 20) == pytest.approx((0.05 ** (1 / 20), 1.0))


@pytest.mark.parametrize("wrong", [(-1, 5, 0.9), (6, 5, 0.9), (0, 0, 0.9), (1, 5, 0.0), (1, 5, 1.0)])
def test_values_out_of_range(wrong: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match=r"expected|must be"):
        clopper_pearson(*wrong)
