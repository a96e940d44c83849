"""Bytes that one GPU sends in an optimizer step, and in how many collectives.

A ring over S ranks sends (S − 1)/S of the whole in an all-gather or a reduce-scatter, twice that in an all-reduce. With
k micro-batches of p passes over a model's weights (the backward is one: every unit is gathered anew, and recomputing a
checkpointed layer needs no gathering of its own), a bytes a gathered number:

    all-gathers      k · p · a·P · (S − 1)/S
    reduce-scatters  4·P_t · (S − 1)/S               once a step: earlier micro-batches keep whole gradients
    all-reduces      2 · 4·P_t/S · (R − 1)/R         over R replicas (HSDP); DDP: S = 1
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from halos_pl.estimate.memory import trainable
from halos_pl.estimate.plan import Plan
from halos_pl.estimate.shapes import Shapes, Unit


@dataclass(frozen=True)
class Traffic:
    """Of one kind of collective in an optimizer step."""

    sent: int  # bytes that leave one GPU
    collectives: int
    size: int  # bytes of their whole tensors together
    ranks: int  # of a group


@dataclass(frozen=True)
class Communication:
    """Of one GPU and optimizer step."""

    gathers: dict[str, Traffic]  # by pass
    reduce_scatter: Traffic
    all_reduce: Traffic
    from_host: int  # bytes of an offloaded reference that come to the device

    @property
    def all_gather(self) -> Traffic:
        found = list(self.gathers.values())
        ranks = max((x.ranks for x in found), default=1)
        return Traffic(sum(x.sent for x in found), sum(x.collectives for x in found), sum(x.size for x in found), ranks)

    @property
    def sent(self) -> int:
        return self.all_gather.sent + self.reduce_scatter.sent + self.all_reduce.sent


def communication(shapes: Shapes, plan: Plan) -> Communication:
    """The communication of an optimizer step. Scalars (z0, the norm of the gradient, metrics) are left out."""
    units = (shapes.root, *shapes.layers)
    gathers, from_host = {}, 0
    for name, count in plan.passes.items():
        policy = name.startswith("policy")
        if plan.strategy == "fsdp" and plan.shard > 1 and count:
            sizes = [plan.bytes * _whole(x, plan, adapters=policy or plan.reference == "adapter") for x in units]
            gathers[name] = _ring(sizes * (count * plan.accumulate), plan.shard)
        if plan.reference == "offloaded" and not policy:
            from_host += plan.accumulate * count * plan.reference_bytes * sum(x.local(plan.shard) for x in units)
    trained = [x for x in (trainable(unit, plan) for unit in units) if x.parameters]
    shards = [4 * x.local(plan.shard) for x in trained]
    return Communication(
        gathers=gathers,
        reduce_scatter=_ring([x * plan.shard for x in shards] if plan.shard > 1 else [], plan.shard),
        all_reduce=_ring(shards if plan.replicas > 1 else [], plan.replicas, times=2),
        from_host=from_host,
    )


def _whole(unit: Unit, plan: Plan, *, adapters: bool) -> int:
    """Elements of the gathered tensor: equal shards, so padding is among them."""
    local = unit.local(plan.shard)
    if plan.lora is not None and adapters:
        local += trainable(unit, plan).local(plan.shard)
    return local * plan.shard


def _ring(sizes: list[int], ranks: int, times: int = 1) -> Traffic:
    return Traffic(int(times * sum(sizes) * Fraction(ranks - 1, ranks)), len(sizes), sum(sizes), ranks)
