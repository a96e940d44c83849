"""Partial softmax statistics of rows, in units of log 2, which merge into log-probabilities.

A partial is (peak, Σ 2^(z − peak), Σ 2^(z − peak)·(z − peak)) over some columns: of a vocabulary split, or of the
chunks so far. (Or of those that one rank holds of a weight that is split over ranks: the same merge will serve.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from halos_kernels.dispatch import architecture, tile
from halos_kernels.inputs import Inputs, LogpOut, Transform
from halos_kernels.jit.math import INTERPRET
from halos_kernels.jit.merge import merge_kernel

LOG2E = 1.4426950408889634


class Partials(NamedTuple):
    """Of one head, or with a leading axis of several."""

    peak: Tensor  # [S, N]
    total: Tensor  # [S, N]
    moment: Tensor  # [S, N]; without entropy no elements
    target: Tensor  # [N] the target's logit; not a number where no column was the target

    @staticmethod
    def start(splits: int, inputs: Inputs, *, entropy: bool, heads: tuple[int, ...] = ()) -> Partials:
        rows, like = inputs.hidden.shape[0], inputs.hidden
        peak = like.new_full((*heads, splits, rows), torch.finfo(torch.float32).min, dtype=torch.float32)
        moment = torch.zeros_like(peak) if entropy else peak.new_empty((*heads, 0))
        return Partials(peak, torch.zeros_like(peak), moment, peak.new_full((*heads, rows), math.nan))

    def head(self, i: int) -> Partials:
        return Partials(*(x[i] for x in self))


def merge(partials: Partials) -> LogpOut:
    """Outputs in nats from all partials of each row, in the order of the splits."""
    splits, rows = partials.peak.shape
    entropy = partials.moment.numel() > 0
    logp, lse = torch.empty_like(partials.target), torch.empty_like(partials.target)
    out = LogpOut(logp, lse, torch.empty_like(logp) if entropy else None)
    block = tile("merge", architecture(logp.device))
    merge_kernel[(triton.cdiv(rows, block["BLOCK"]),)](
        *partials,
        logp,
        lse,
        lse if out.entropy is None else out.entropy,
        rows,
        splits,
        ENTROPY=entropy,
        INTERPRETED=INTERPRET,
        **block,
    )
    return out


def at_target(partials: Partials, transform: Transform) -> tuple[Tensor, Tensor | None]:
    """Σ exp(z − peak) [N] over all columns, relative to the largest peak; and 1 − tanh² at the target [N] if capped."""
    total = (torch.exp2(partials.peak - partials.peak.amax(0)) * partials.total).sum(0)
    if transform.softcap is None:
        return total, None
    return total, 1.0 - (partials.target / binary(transform)[1]).square()


def binary(transform: Transform) -> tuple[float, float]:
    """`inner` and `outer` for logits in units of log 2."""
    capped = transform.softcap is not None
    return (transform.inner, transform.outer * LOG2E) if capped else (transform.inner * LOG2E, 1.0)
