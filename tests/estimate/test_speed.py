"""Operations by hand, and which links a ring takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from halos_pl.estimate import Lora, Machine, Plan, PlanError, Shapes, speed
from halos_pl.estimate.speed import forward_flops, step_flops

ONCE = 2 * 960 * 6 + 2 * 6 * 3 * 8 * 2  # two layers of 480 weights in products, and their attention
PRODUCT = 2 * 3 * 10 * 8  # of the head


def test_operations(shapes: Shapes, plan: Plan) -> None:
    assert forward_flops(shapes, 6, 3) == ONCE
    assert step_flops(shapes, plan) == 6 * ONCE + 7 * PRODUCT
    assert step_flops(shapes, replace(plan, checkpointing=True)) == 7 * ONCE + 7 * PRODUCT
    assert step_flops(shapes, replace(plan, lora=Lora(2))) == 5 * ONCE + 5 * PRODUCT
    assert step_flops(shapes, replace(plan, mismatched=False, accumulate=2)) == 2 * (4 * ONCE + 5 * PRODUCT)


def test_links(shapes: Shapes, plan: Plan) -> None:
    """Two nodes of 4. A ring of 8 has four members a node, rings of replicas of 4-GPU copies one each."""
    machine = Machine(flops=1e12, mfu=0.5, bandwidth=100, network=10, gpus_per_node=4, latency=0)
    found = speed(shapes, plan, machine)
    assert found.gather == pytest.approx(7 * 1160 / 100e9)
    assert found.compute == pytest.approx(step_flops(shapes, plan) / 0.5e12)
    wide = speed(shapes, replace(plan, gpus=4, shard=4), machine).gather
    across = speed(shapes, replace(plan, gpus=8, shard=8), machine).gather
    assert across > wide * 100 / 40
    replicas = speed(shapes, replace(plan, gpus=8, shard=4), machine)
    assert replicas.replicate == pytest.approx(2 * 4 * 300 / 2 / 10e9, rel=0.05)
    assert speed(shapes, replace(plan, gpus=8, shard=2), machine).replicate == pytest.approx(2 * 4 * 580 * 3 / 4 / 20e9)


def test_latency(shapes: Shapes, plan: Plan) -> None:
    found = speed(shapes, replace(plan, gpus=8, shard=4), Machine(latency=1.0))
    assert found.latency == pytest.approx(1e-6 * ((15 + 3) * 3 + 3 * 2 * 1))


def test_what_bounds(shapes: Shapes, plan: Plan) -> None:
    assert speed(shapes, plan, Machine(flops=1e6)).bound == "computation"
    assert speed(shapes, plan, Machine(latency=1e6)).bound == "links"
    found = speed(shapes, replace(plan, reference="offloaded"), Machine(host=1e-9, latency=0))
    assert found.bound == "host memory"
    assert found.serial == pytest.approx(found.compute + found.communication + found.host)
    assert found.tokens == 12
    with pytest.raises(PlanError, match="mfu is a share"):
        Machine(mfu=40)
