"""What `halos_kernels` holds beside its inputs: no logits of tokens × vocabulary, one chunk of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from halos_kernels.chunks import limits, width
from halos_kernels.inputs import Inputs, Transform

from halos_pl.estimate.plan import Plan
from halos_pl.estimate.shapes import Shapes


class HeadWorkspace(NamedTuple):
    """Bytes, at most: of the strategy that writes chunks of logits. The tiled one holds less."""

    forward: int  # without gradients
    scoring: int  # the forward pass of the policy
    backward: int
    weight_gradient: int


def head_workspace(shapes: Shapes, plan: Plan, device: str = "cuda") -> HeadWorkspace:
    """Of one micro-batch.

    Args:
        shapes: of the model.
        plan: its N scored tokens, and what is trained.
        device: whose chunks: "cuda" or "cpu".
    """
    n, d, v = plan.targets, shapes.hidden, shapes.vocabulary
    a = 2 if plan.compute == "bfloat16" else 4  # autocast hands float32 to the head
    copy = 2 if a == 2 and device == "cuda" else 0  # of logits in half precision: the CPU multiplies float32
    bytes_each = 4 + copy
    widened = 4 * n * d if a == 2 and device == "cpu" else 0
    rows = math.ceil(n / math.ceil(n / limits(torch.device(device)).rows))
    forward = 4 * rows * columns(rows, d, v, n, bytes_each, device)
    if plan.lora is not None:  # ∂logp/∂hidden is formed in the forward: exponentials, their sum in float32
        parts = 2 * a * n * d if n > rows else a * n * d * (a == 2)  # of blocks of rows, then put together
        scoring = forward // 4 * (4 + copy) + 4 * rows * d + parts
        return HeadWorkspace(forward, scoring, a * n * d, 0)
    backward = (4 + copy) * n * columns(n, d, v, n, bytes_each, device) + (6 if a == 2 else 4) * n * d + widened
    return HeadWorkspace(forward, forward, backward, a * v * d)


def columns(rows: int, d: int, vocabulary: int, tokens: int, bytes_each: int, device: str) -> int:
    """Of one chunk, as the kernels choose it."""
    like = torch.empty(1, device="cpu" if device == "cpu" else "meta")
    none = torch.empty(0, device=like.device)
    call = Inputs(like.expand(rows, d), like.expand(vocabulary, d), None, none, Transform(), tokens)
    return width(call, bytes_each)
