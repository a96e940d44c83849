"""Chunks are the kernels' own; the sums by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from halos_kernels.chunks import width
from halos_kernels.inputs import Inputs, Transform

from halos_pl.estimate import Lora, Plan, Shapes
from halos_pl.estimate.head import columns, head_workspace

PLAN = Plan(rows=4, length=4096)  # N = 8192


@pytest.mark.parametrize(("n", "d", "v"), [(3, 8, 10), (700, 16, 3000), (64, 8, 50000)])
def test_columns_are_those_of_the_kernels(n: int, d: int, v: int) -> None:
    call = Inputs(torch.empty(n, d), torch.empty(v, d), None, torch.zeros(n, dtype=torch.long), Transform(), n)
    assert columns(n, d, v, n, 4, "cpu") == width(call)


def test_at_the_size_of_8b(shapes: Shapes) -> None:
    """Four blocks of 2048 rows in 8 chunks of the vocabulary; the backward's 8192 rows in 32. 192 MiB bound both."""
    wide = replace(shapes, hidden=4096, vocabulary=128256)
    found = head_workspace(wide, PLAN)
    assert found.forward == found.scoring == 4 * 2048 * 16064
    assert found.backward == 6 * 8192 * 4032 + 6 * 8192 * 4096
    assert found.weight_gradient == 2 * 128256 * 4096
    assert max(found.forward, 6 * 8192 * 4032) < 192 * 2**20 * 1.02


def test_frozen(shapes: Shapes) -> None:
    wide = replace(shapes, hidden=4096, vocabulary=128256)
    found = head_workspace(wide, replace(PLAN, lora=Lora()))
    assert found.scoring == 6 * 2048 * 16064 + 4 * 2048 * 4096 + 2 * 2 * 8192 * 4096
    assert (found.backward, found.weight_gradient) == (2 * 8192 * 4096, 0)
