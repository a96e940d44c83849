"""Bytes by hand; that a step sends these bytes is counted in tests/benchmarks/test_scaling.py."""

from __future__ import annotations

from dataclasses import replace

from halos_pl.estimate import Lora, Plan, Shapes, communication


def test_two_ranks(shapes: Shapes, plan: Plan) -> None:
    """Five passes over 2·1160 bytes in three units, half of which come from the other rank; gradients once."""
    found = communication(shapes, plan)
    assert (found.all_gather.sent, found.all_gather.collectives) == (5 * 1160, 15)
    assert (found.reduce_scatter.sent, found.reduce_scatter.collectives) == (2 * 1160, 3)
    assert found.all_reduce.sent == 0
    assert found.sent == 7 * 1160


def test_padding_is_sent(shapes: Shapes, plan: Plan) -> None:
    """Of three ranks: layers 3·186, the root 3·67 (two matrices of 4·8, a norm of 3)."""
    found = communication(shapes, replace(plan, gpus=3, shard=3))
    assert found.gathers["policy y forward"].sent == 2 * (2 * 558 + 201) * 2 // 3


def test_replicas_reduce_their_shards(shapes: Shapes, plan: Plan) -> None:
    found = communication(shapes, replace(plan, gpus=8))
    assert (found.all_reduce.sent, found.all_reduce.collectives) == (2 * 4 * 580 * 3 // 4, 3)
    assert communication(shapes, Plan(rows=1, length=1, gpus=4, strategy="ddp")).sent == 2 * 4 * 1160 * 3 // 4


def test_only_the_last_micro_batch_reduces(shapes: Shapes, plan: Plan) -> None:
    found = communication(shapes, replace(plan, accumulate=3))
    assert (found.all_gather.sent, found.reduce_scatter.sent) == (3 * 5 * 1160, 2 * 1160)


def test_lora_gathers_all_and_reduces_adapters(shapes: Shapes, plan: Plan) -> None:
    """464 adapter parameters; the reference has none of its own."""
    found = communication(shapes, replace(plan, lora=Lora(2)))
    assert found.all_gather.sent == 5 * 1160 + 3 * 464
    assert (found.reduce_scatter.sent, found.reduce_scatter.collectives) == (2 * 464, 2)
    switched = communication(shapes, replace(plan, lora=Lora(2), reference="adapter"))
    assert switched.all_gather.sent == 5 * (1160 + 464)


def test_an_offloaded_reference_comes_from_the_host(shapes: Shapes, plan: Plan) -> None:
    assert communication(shapes, replace(plan, reference="offloaded")).from_host == 2 * 4 * 580
    assert communication(shapes, replace(plan, reference="cached")).all_gather.sent == 3 * 1160
