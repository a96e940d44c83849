"""Partial softmax statistics [3, S, N] in units of log 2, which merge into log-probabilities.

A partial is (peak, Σ 2^(z − peak), Σ 2^(z − peak)·(z − peak)) over some columns: of a vocabulary split, or of the
chunks so far. (Or of those that one rank holds of a weight that is split over ranks: the same merge will serve.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from halos_kernels.inputs import Inputs, LogpOut, Transform
from halos_kernels.jit.math import INTERPRET
from halos_kernels.jit.merge import merge_kernel

LOG2E = 1.4426950408889634


class Partials(NamedTuple):
    peak: Tensor  # [S, N]
    total: Tensor  # [S, N]
    moment: Tensor  # [S, N], or [0] without entropy
    target: Tensor  # [N] the target's logit; not a number where no column was the target

    @staticmethod
    def start(splits: int, inputs: Inputs, *, entropy: bool) -> Partials:
        rows, like = inputs.hidden.shape[0], inputs.hidden
        peak = like.new_full((splits, rows), torch.finfo(torch.float32).min, dtype=torch.float32)
        moment = torch.zeros_like(peak) if entropy else peak.new_empty(0)
        return Partials(peak, torch.zeros_like(peak), moment, peak.new_full((rows,), math.nan))


def merge(partials: Partials) -> LogpOut:
    """Outputs in nats from all partials of each row, in the order of the splits."""
    splits, rows = partials.peak.shape
    entropy = partials.moment.numel() > 0
    logp, lse = torch.empty_like(partials.target), torch.empty_like(partials.target)
    out = LogpOut(logp, lse, torch.empty_like(logp) if entropy else None)
    merge_kernel[(triton.cdiv(rows, 128),)](
        *partials,
        logp,
        lse,
        lse if out.entropy is None else out.entropy,
        rows,
        splits,
        ENTROPY=entropy,
        INTERPRETED=INTERPRET,
        BLOCK=128,
    )
    return out


def binary(transform: Transform) -> tuple[float, float]:
    """`inner` and `outer` for logits in units of log 2."""
    capped = transform.softcap is not None
    return (transform.inner, transform.outer * LOG2E) if capped else (transform.inner * LOG2E, 1.0)


def total(partials: Partials) -> Tensor:
    """Σ exp(z − peak) [N] over all columns, relative to the largest peak."""
    fall = torch.exp2(partials.peak - partials.peak.amax(0))
    return (fall * partials.total).sum(0)


def cap_slope(partials: Partials, transform: Transform) -> Tensor | None:
    """1 − tanh² at the target [N]; None without a cap."""
    if transform.softcap is None:
        return None
    return 1.0 - (partials.target / binary(transform)[1]).square()
