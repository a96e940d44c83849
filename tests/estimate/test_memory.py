"""Sharded state, the moments that may be the peak, and the largest micro-batch, by hand."""

from __future__ import annotations

from dataclasses import replace

from halos_pl.estimate import Lora, Plan, Shapes, largest_rows, memory
from halos_pl.estimate.activations import activations
from halos_pl.estimate.head import head_workspace


def test_what_stays(shapes: Shapes, plan: Plan) -> None:
    found = memory(shapes, plan)
    assert (found.weights, found.optimizer, found.reference, found.gradients) == (2320, 4640, 2320, 2320)
    assert found.total == found.stays + found.peak
    assert found.stays == 2320 + 4640 + 2320
    assert found.host == 0


def test_ways_of_the_reference(shapes: Shapes, plan: Plan) -> None:
    assert memory(shapes, replace(plan, reference_bytes=2)).reference == 1160
    offloaded = memory(shapes, replace(plan, reference="offloaded"))
    assert (offloaded.reference, offloaded.host) == (0, 2320)
    for way in ("none", "cached"):
        assert memory(shapes, replace(plan, reference=way)).reference == 0  # type: ignore[arg-type]


def test_lora_trains_its_adapters(shapes: Shapes, plan: Plan) -> None:
    """r = 2: Σ 2·(inputs + outputs) = 2·(16 + 12 + 12 + 16 + 20 + 20 + 20) a layer, in halves."""
    found = memory(shapes, replace(plan, lora=Lora(2)))
    assert (found.weights, found.gradients, found.optimizer) == (2320 + 4 * 232, 4 * 232, 8 * 232)


def test_moments(shapes: Shapes, plan: Plan) -> None:
    found, kept = memory(shapes, plan).phases, activations(shapes, plan)
    head = head_workspace(shapes, plan)
    saved = kept.layers + kept.root
    assert found["root's backward"] == {"gathered": 2 * 168, "gradients": 6 * 168 + 2320}
    assert found["optimizer step"] == {"gradients": 2320, "working": 2320}
    last = found["last layer's backward"]
    assert last["gathered"] == 2 * 168 + 2 * 2 * 496
    assert last["activations"] == saved
    assert last["gradients"] == head.weight_gradient + 6 * 496
    assert found["y′ forward"]["gathered"] == 2 * 2 * 168 + 3 * 2 * 496
    assert found["forward"]["gathered"] == 2 * 168 + 3 * 2 * 496


def test_whole_gradients_wait_for_the_last_micro_batch(shapes: Shapes, plan: Plan) -> None:
    found = memory(shapes, replace(plan, accumulate=2))
    assert found.accumulated == 4 * 1160
    assert found.phases["forward"]["whole gradients"] == 4 * 1160
    assert memory(shapes, plan).accumulated == 0


def test_without_sharding(shapes: Shapes) -> None:
    alone = Plan(rows=2, length=3, compute="float32")
    found = memory(shapes, alone)
    assert (found.weights, found.gradients) == (4640, 4640)
    assert all(phase.get("gathered", 0) == 0 for phase in found.phases.values())
    assert memory(shapes, replace(alone, gpus=2, strategy="ddp")).gradients == 2 * 4640


def test_the_largest_micro_batch(shapes: Shapes, plan: Plan) -> None:
    limit = memory(shapes, replace(plan, rows=37)).total
    assert largest_rows(shapes, plan, limit) == 37
    assert largest_rows(shapes, plan, limit - 1) == 36
    assert largest_rows(shapes, plan, 100) == 0
