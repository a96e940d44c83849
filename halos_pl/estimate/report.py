"""Everything that the command tells, as values that JSON can hold."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from halos_pl.estimate.communication import communication
from halos_pl.estimate.memory import largest_rows, memory, trainable
from halos_pl.estimate.plan import Plan
from halos_pl.estimate.shapes import Shapes
from halos_pl.estimate.speed import Machine, speed

GIB = 2**30
Report = dict[str, Any]


def report(shapes: Shapes, plan: Plan, machine: Machine, *, limit: float, rows: int = 1) -> Report:
    """Memory in bytes of one GPU, communication in bytes that it sends in an optimizer step, time in seconds.

    Args:
        shapes: of the model.
        plan: of the run.
        machine: its rates.
        limit: bytes of a GPU.
        rows: token rows of an example: 1, or 2 for pairs.
    """
    held, moved, times = memory(shapes, plan), communication(shapes, plan), speed(shapes, plan, machine)
    units = (shapes.root, *shapes.layers)
    return {
        "model": {
            "parameters": shapes.numel,
            "layers": len(shapes.layers),
            "layer_parameters": shapes.largest_layer.numel,
            "root_parameters": shapes.root.numel,
            "llama_like": shapes.llama_like,
            "trained_parameters": sum(trainable(x, plan).numel for x in units),
        },
        "plan": asdict(plan) | {"replicas": plan.replicas, "tokens": plan.tokens, "passes": plan.passes},
        "memory": {
            "weights": held.weights,
            "optimizer": held.optimizer,
            "reference": held.reference,
            "peak_phase": held.peak_phase,
            "peak": held.phases[held.peak_phase],
            "total": held.total,
            "limit": int(limit),
            "phases": {name: sum(phase.values()) for name, phase in held.phases.items()},
            "gradients": held.gradients,
            "activations": held.activations,
            "host": held.host,
        },
        "fits": held.total <= limit,
        "largest_batch_size": largest_rows(shapes, plan, limit) // rows,
        "communication": {
            "all_gather": {name: x.sent for name, x in moved.gathers.items()},
            "reduce_scatter": moved.reduce_scatter.sent,
            "all_reduce": moved.all_reduce.sent,
            "sent": moved.sent,
            "collectives": moved.all_gather.collectives
            + moved.reduce_scatter.collectives
            + moved.all_reduce.collectives,
            "from_host": moved.from_host,
        },
        "time": {
            "flops": times.flops,
            "compute": times.compute,
            "links": times.communication,
            "latency": times.latency,
            "host": times.host,
            "overlapped": times.overlapped,
            "serial": times.serial,
            "bound": times.bound,
            "tokens_per_second": [times.tokens / times.serial, times.tokens / times.overlapped],
        },
        "machine": asdict(machine),
    }
