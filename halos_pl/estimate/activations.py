"""What autograd keeps of a Llama-like decoder for the backward pass, in bytes.

After Korthikanti et al. 2022, section 4, with RMSNorm, a gated MLP, grouped queries and an attention that keeps no
scores (SDPA, flash attention). a bytes a number, n tokens, widths d (hidden), f (MLP), q and k (queries; keys, and as
many values), h heads; of one layer:

    norms      2n(4 + (4 + 2a)d)          a = 2: the input in float32, what is normalised, what the products read
               2n(4 + 12d)                a = 4: the same without a copy of the input
    attention  n(2a·q + 2a·k + 4h)        queries and output, keys and values, log-sum-exps
    MLP        4a·n·f                     gate, its SiLU, the other branch, their product
"""

from __future__ import annotations

from typing import NamedTuple

from halos_pl.estimate.plan import Plan
from halos_pl.estimate.shapes import Shapes


class Activations(NamedTuple):
    """Bytes that live from the forward to the backward pass of a micro-batch, and what a layer works with meanwhile."""

    layers: int
    root: int
    working: int  # of the layer at hand in the backward pass: recomputed activations, gradients of activations
    forward: int  # of the layer at hand in a pass without gradients


def layer(shapes: Shapes, plan: Plan) -> int:
    """Of one layer without checkpointing."""
    n, a, d, f = plan.tokens, plan.bytes, shapes.hidden, shapes.intermediate
    wide = 4 if plan.compute == "autocast" else a
    of_a_norm = 4 + (4 + 2 * a) * d  # also in float32, where the copy is none
    if plan.compute == "autocast":
        of_a_norm = 4 + 2 * wide * d
    total = n * (2 * of_a_norm + 2 * a * shapes.queries + 2 * a * shapes.keys + 4 * shapes.heads + 4 * a * f)
    if plan.compute == "autocast":
        total += n * 5 * a * d  # the inputs of q, k, v, gate and up, each cast anew
    return total + (_adapters(shapes, plan) - (2 * n * wide * d) if plan.lora else 0)


def activations(shapes: Shapes, plan: Plan) -> Activations:
    """Of the pass that carries gradients, and of one that does not.

    With checkpointing a layer keeps its input, and the one at hand has all of its activations.
    """
    n, a, d = plan.tokens, plan.bytes, shapes.hidden
    wide = 4 if plan.compute in ("autocast", "float32") else a
    whole, count = layer(shapes, plan), len(shapes.layers)
    kept = count * (n * wide * d if plan.checkpointing else whole)
    if plan.compute == "autocast" and not plan.checkpointing:  # a copy of each weight is part of the graph
        kept += sum(a * rows * columns for x in shapes.layers for _, rows, columns in x.linears)
    rope = 2 * a * plan.length * shapes.head_width
    norm = n * (4 + 4 * d + (0 if plan.lora else wide * d))
    predicting = plan.targets * (wide * d + (0 if plan.lora else 4))  # frozen: their gradient, formed in the forward
    gradients = n * a * (3 * shapes.intermediate + 2 * d)
    return Activations(
        layers=kept,
        root=norm + predicting + rope,
        working=gradients + (whole if plan.checkpointing else 0),
        forward=n * (2 * wide * d + a * (3 * shapes.intermediate + d)),
    )


def _adapters(shapes: Shapes, plan: Plan) -> int:
    """What adapters keep beside what their layers do: the r outputs of each A."""
    assert plan.lora is not None
    pairs = len(shapes.layers[0].adapters(plan.lora.r, plan.lora.targets).parameters) // 2
    return plan.tokens * plan.bytes * plan.lora.r * pairs
