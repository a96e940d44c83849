"""Formulas by hand; that autograd keeps these bytes is measured in tests/benchmarks/test_scaling.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from halos_pl.estimate import Lora, Plan, Shapes
from halos_pl.estimate.activations import activations, layer

ALONE = Plan(rows=2, length=3)


@pytest.mark.parametrize(
    ("compute", "each"),
    [
        ("bfloat16", 8 + 16 * 8 + 4 * 8 + 4 * 4 + 4 * 2 + 8 * 12),
        ("float32", 8 + 24 * 8 + 8 * 8 + 8 * 4 + 4 * 2 + 16 * 12),
        ("autocast", 8 + 26 * 8 + 4 * 8 + 4 * 4 + 4 * 2 + 8 * 12),
    ],
)
def test_of_a_layer(shapes: Shapes, compute: str, each: int) -> None:
    plan = replace(ALONE, compute=compute)  # type: ignore[arg-type]
    assert layer(shapes, plan) == 6 * each
    copies = 2 * 480 if compute == "autocast" else 0
    assert activations(shapes, plan).layers == 2 * (6 * each + copies)


def test_of_the_root(shapes: Shapes) -> None:
    """The last norm, the predicting states with their log-sum-exp, rotary tables."""
    assert activations(shapes, ALONE).root == 6 * (4 + 6 * 8) + 3 * (2 * 8 + 4) + 2 * 2 * 3 * 4
    assert activations(shapes, replace(ALONE, lora=Lora(1))).root == 6 * (4 + 4 * 8) + 3 * 2 * 8 + 2 * 2 * 3 * 4


def test_checkpointing_keeps_inputs(shapes: Shapes) -> None:
    plan = replace(ALONE, checkpointing=True)
    found, without = activations(shapes, plan), activations(shapes, ALONE)
    assert found.layers == 2 * 6 * 2 * 8
    assert found.working - without.working == layer(shapes, ALONE)


def test_adapters_and_frozen_norms(shapes: Shapes) -> None:
    """Seven outputs of A, and two normalised inputs less."""
    assert layer(shapes, ALONE) - layer(shapes, replace(ALONE, lora=Lora(3))) == 6 * (2 * 2 * 8 - 2 * 3 * 7)
