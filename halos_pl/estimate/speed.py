"""Seconds of a step from operations and bytes, and what bounds it. A sketch: rates are assumptions of the caller's."""

from __future__ import annotations

from dataclasses import dataclass

from halos_pl.estimate.communication import Communication, Traffic, communication
from halos_pl.estimate.plan import Plan, PlanError
from halos_pl.estimate.shapes import Shapes

PRODUCTS = {"policy y forward": 1, "policy y backward": 2}
"""How many times the operations of a forward pass; every pass without gradients is one."""


@dataclass(frozen=True)
class Machine:
    """What one GPU of a cluster does."""

    flops: float = 989e12  # dense bf16, a second
    mfu: float = 0.4  # share of them that products of this size reach
    bandwidth: float = 360.0  # GB/s that a GPU sends to others of its node
    network: float = 45.0  # GB/s that a GPU sends to other nodes
    gpus_per_node: int = 8
    latency: float = 5.0  # µs of each step of a ring
    host: float = 25.0  # GB/s from host memory to a GPU

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "latency" else 1e-12
            if not least <= value < float("inf"):
                raise PlanError(f"{name} must be a positive number, got {value}")
        if self.mfu > 1:
            raise PlanError(f"mfu is a share of the peak, in (0, 1], got {self.mfu}")


@dataclass(frozen=True)
class Speed:
    """Of one optimizer step."""

    flops: float  # of one GPU
    compute: float  # seconds
    gather: float  # seconds of all-gathers and reduce-scatters
    replicate: float  # seconds of all-reduces
    host: float  # seconds of copies from the host
    latency: float  # seconds of gather and replicate that no bandwidth takes away
    tokens: int  # of y, padding included, on all GPUs

    @property
    def communication(self) -> float:
        return self.gather + self.replicate

    @property
    def overlapped(self) -> float:
        """If communication hides behind computation entirely."""
        return max(self.compute, self.communication, self.host)

    @property
    def serial(self) -> float:
        """If nothing does."""
        return self.compute + self.communication + self.host

    @property
    def bound(self) -> str:
        times = {"computation": self.compute, "links": self.communication, "host memory": self.host}
        return max(times, key=lambda name: times[name])


def forward_flops(shapes: Shapes, tokens: int, length: int) -> int:
    """Of all layers in one pass: 2 for each weight and token, and half of 4·n·T·q for the causal attention of each."""
    weights = sum(rows * columns for x in shapes.layers for _, rows, columns in x.linears)
    return 2 * weights * tokens + 2 * tokens * length * shapes.queries * len(shapes.layers)


def step_flops(shapes: Shapes, plan: Plan) -> int:
    """Of one GPU and optimizer step. Adapters are left out; a frozen weight's gradient is not formed.

    The head takes 1 product without gradients, 4 with (its backward recomputes the logits), 2 where it is frozen.
    """
    once = forward_flops(shapes, plan.tokens, plan.length)
    product = 2 * plan.targets * shapes.vocabulary * shapes.hidden
    total = 0
    for name, count in plan.passes.items():
        times = PRODUCTS.get(name, 1)
        if name == "policy y backward":
            times = (1 if plan.lora else times) + plan.checkpointing
            total += count * product * (1 if plan.lora else 3)
        else:
            total += count * product
        total += count * times * once
    return total * plan.accumulate


def speed(shapes: Shapes, plan: Plan, machine: Machine) -> Speed:
    """Seconds of a step on such a machine."""
    moved: Communication = communication(shapes, plan)
    node = machine.gpus_per_node
    inside, across = min(plan.shard, node), max(1, min(plan.replicas, node // min(plan.shard, node)))
    gather, gather_latency = _seconds([moved.all_gather, moved.reduce_scatter], plan.shard <= node, inside, machine)
    replicate, latency = _seconds([moved.all_reduce], plan.gpus <= node, across, machine, times=2)
    flops = step_flops(shapes, plan)
    return Speed(
        flops=flops,
        compute=flops / (machine.flops * machine.mfu),
        gather=gather + gather_latency,
        replicate=replicate + latency,
        host=moved.from_host / (machine.host * 1e9),
        latency=gather_latency + latency,
        tokens=plan.tokens * plan.accumulate * plan.gpus,
    )


def _seconds(
    moved: list[Traffic], one_node: bool, members: int, machine: Machine, times: int = 1
) -> tuple[float, float]:
    """Of bytes, and of latency. A ring over nodes leaves each node once, through the adapters of all its members."""
    rate = machine.bandwidth if one_node else min(machine.bandwidth, members * machine.network)
    steps = sum(x.collectives * (x.ranks - 1) * times for x in moved)
    return sum(x.sent for x in moved) / (rate * 1e9), steps * machine.latency * 1e-6
