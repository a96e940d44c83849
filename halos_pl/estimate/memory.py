"""Bytes of one GPU in a training step: what stays, and the most that its passes need beside that.

Sharded state follows ZeRO (Rajbhandari et al. 2020, section 5) and FSDP (Zhao et al. 2023), here as FSDP2 lays it out:
with P parameters, of which P_t are trained, and S ranks that share a copy,

    weights 4·P/S    gradients 4·P_t/S    optimizer 4·k·P_t/S    reference 4·P/S

where P/S stands for Σ ⌈rows/S⌉·columns over all parameters. Numbers of a GPU are those of the rank that holds most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from halos_pl.estimate.activations import activations
from halos_pl.estimate.head import head_workspace
from halos_pl.estimate.plan import Plan
from halos_pl.estimate.shapes import Shapes, Unit

Phase = dict[str, int]
"""Bytes beside what stays, at a moment: gathered, activations, working, head, gradients, whole gradients."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. The total is what stays, and the largest of the phases."""

    weights: int
    optimizer: int
    reference: int
    gradients: int  # when all are there
    accumulated: int  # whole gradients in float32, between micro-batches that are not reduced
    activations: int  # when all are there
    phases: dict[str, Phase]
    host: int  # of an offloaded reference, in the memory of the host

    @property
    def stays(self) -> int:
        return self.weights + self.optimizer + self.reference

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.phases[self.peak_phase].values())

    @property
    def total(self) -> int:
        return self.stays + self.peak


def memory(shapes: Shapes, plan: Plan, device: str = "cuda") -> Memory:
    """The memory of a step, bytes of one GPU; `device` is whose chunks of logits: "cuda" or "cpu"."""
    units = (shapes.root, *shapes.layers)
    trained = [trainable(x, plan) for x in units]
    own, learnt = (sum(x.local(plan.shard) for x in found) for found in (units, trained))
    copy = plan.reference_bytes * own if plan.has_copy else 0
    kept, whole = activations(shapes, plan), sum(x.numel for x in trained)
    return Memory(
        weights=plan.weight_bytes * (own + (learnt if plan.lora else 0)),
        optimizer=4 * plan.optimizer_states * learnt,
        reference=copy if plan.reference == "resident" else 0,
        gradients=plan.weight_bytes * learnt * (2 if plan.strategy == "ddp" else 1),  # DDP's buckets
        accumulated=4 * whole if plan.strategy == "fsdp" and plan.accumulate > 1 else 0,
        activations=kept.layers + kept.root,
        phases=_phases(shapes, plan, device),
        host=copy if plan.reference == "offloaded" else 0,
    )


def trainable(unit: Unit, plan: Plan) -> Unit:
    """What is trained of a unit: all of it, or its adapters."""
    return unit if plan.lora is None else unit.adapters(plan.lora.r, plan.lora.targets)


def gathered_unit(unit: Unit, plan: Plan) -> int:
    """Parameters of a unit of the policy when it is whole, adapters included."""
    return unit.numel + (trainable(unit, plan).numel if plan.lora else 0)


def _phases(shapes: Shapes, plan: Plan, device: str) -> dict[str, Phase]:
    """The moments that may be the peak.

    FSDP2 holds the root while its forward or backward runs, the layer at hand, and the output of the all-gather that
    runs ahead; in the forward also the output that the layer at hand was copied from. A unit's gradients are formed
    whole, and copied to float32 to be reduced. Under DDP and on one GPU weights and gradients are whole anyway.
    """
    fsdp, a, d = plan.strategy == "fsdp", plan.bytes, shapes.hidden
    kept, head = activations(shapes, plan), head_workspace(shapes, plan, device)
    root, layer = (a * fsdp * gathered_unit(x, plan) for x in (shapes.root, shapes.largest_layer))
    learnt, root_learnt = (trainable(x, plan).numel for x in (shapes.largest_layer, shapes.root))
    shards = [plan.weight_bytes * trainable(x, plan).local(plan.shard) for x in (shapes.root, *shapes.layers)]
    before = 0 if fsdp else sum(shards) * (1 + (plan.strategy == "ddp")) * (plan.accumulate > 1)
    earlier = 4 * fsdp * (plan.accumulate > 1) * sum(trainable(x, plan).numel for x in (shapes.root, *shapes.layers))
    own = a * learnt + 4 * learnt * fsdp
    saved, each = kept.layers + kept.root, kept.layers // len(shapes.layers)
    after = sum(shards) * (2 if plan.strategy == "ddp" else 1)
    phases: dict[str, Phase] = {
        "forward": {"gathered": root + 3 * layer, "activations": saved, "working": kept.forward},
        "head's forward": {"gathered": root + layer, "activations": saved, "head": head.scoring},
        "head's backward": {
            "gathered": root,
            "activations": saved,
            "head": head.backward,
            "gradients": head.weight_gradient,
        },
        "last layer's backward": {
            "gathered": root + 2 * layer,
            "activations": saved,
            "working": kept.working,
            "gradients": head.weight_gradient + own,
        },
        "first layer's backward": {
            "gathered": root + layer,
            "activations": each,
            "working": kept.working,
            "gradients": head.weight_gradient + own + after - shards[0],
        },
    }
    if plan.mismatched:
        roots = root * (1 + plan.compares)
        passing = {"working": kept.forward, "head": 2 * a * plan.targets * d + head.forward}
        phases["y′ forward"] = {"gathered": roots + 3 * layer, **dict([max(passing.items(), key=lambda x: x[1])])}
    for name, phase in phases.items():
        phase["gradients"] = phase.get("gradients", 0) + (0 if name == "first layer's backward" else before)
        phase["whole gradients"] = 4 * root_learnt * (earlier > 0) if name == "first layer's backward" else earlier
    reduced = (a + 4) * root_learnt if fsdp else head.weight_gradient
    phases["root's backward"] = {"gathered": root, "gradients": reduced + after}
    phases["optimizer step"] = {"gradients": after, "working": sum(shards)}  # AdamW's list of square roots
    return phases


def largest_rows(shapes: Shapes, plan: Plan, limit: float) -> int:
    """The most rows of a micro-batch whose total is within `limit` bytes; 0 where not even one is."""

    def fits(rows: int) -> bool:
        return memory(shapes, replace(plan, rows=rows)).total <= limit

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
