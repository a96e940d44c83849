"""Intervals for counted successes."""

from __future__ import annotations

import math
from collections.abc import Callable


def clopper_pearson(successes: int, total: int, confidence: float = 0.9) -> tuple[float, float]:
    """Exact two-sided interval of a binomial proportion (Clopper and Pearson 1934).

    Args:
        successes: counted, 0 to `total`.
        total: trials, at least 1.
        confidence: in (0, 1); each side leaves out half of the rest.

    Raises:
        ValueError: a count or the confidence out of its range.
    """
    if not 0 <= successes <= total or total < 1:
        raise ValueError(f"expected 0 ≤ successes ≤ total and total ≥ 1, got {successes} of {total}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else _root(lambda p: _at_least(successes, total, p) - tail)
    high = 1.0 if successes == total else _root(lambda p: _at_least(successes + 1, total, p) - (1 - tail))
    return low, high


def _at_least(k: int, n: int, p: float) -> float:
    """P(X ≥ k) for X ~ Binomial(n, p), 0 < p < 1."""
    constant = math.lgamma(n + 1)
    terms = (
        constant - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k, n + 1)
    )
    return math.fsum(map(math.exp, terms))


def _root(rising: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
