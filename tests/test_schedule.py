"""Schedules that have no meaning are refused; the shapes of the others are in test_module."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from halos_pl.models import ModelError
from halos_pl.schedule import learning_rate


def rates(name: Any, warmup: float, steps: float, count: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = learning_rate(optimizer, name, warmup, steps)
    out = []
    for _ in range(count):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def test_constant_needs_no_end() -> None:
    assert rates("constant", 0, math.inf, 3) == [1, 1, 1]
    assert rates("constant", 2, math.inf, 4) == [0, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("name", "warmup", "steps", "message"),
    [
        ("cosine", 0, math.inf, "needs an end"),
        ("constant", 0.1, math.inf, "needs an end"),
        ("linear", 100, 2, "100 steps of warm-up, but the run has 2"),
    ],
)
def test_refused(name: str, warmup: float, steps: float, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        rates(name, warmup, steps, 1)
