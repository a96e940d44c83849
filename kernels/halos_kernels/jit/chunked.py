"""Kernels of the strategy "chunked": what happens to a chunk of float32 products that the vendor's library wrote."""

from __future__ import annotations

import triton
import triton.language as tl

from halos_kernels.jit.math import FLOOR, LOG2E, LOWEST, bound, dlogits_from, logits


@triton.jit(do_not_specialize=["N", "v0"])
def fold_kernel(
    U,
    BIAS,
    TARGETS,
    PEAK,
    TOTAL,
    MOMENT,
    TARGET,
    E,
    RESCALE,
    N,
    v0,
    n_columns,
    stride_u,
    stride_e,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    STORE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows of a chunk [N, n] into the running softmax; with STORE also exp(z − peak) · slope of the cap into E.

    Each lane keeps its own maximum and sum, so that a row is reduced once.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    base = tl.minimum(rows, N - 1).to(tl.int64)
    offsets = tl.arange(0, BLOCK_N)
    peak = tl.full((BLOCK_M, BLOCK_N), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    moment = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, bound(n_columns, INTERPRETED), BLOCK_N):
        columns = start + offsets
        valid = (columns < n_columns)[None, :]
        u = tl.load(U + base[:, None] * stride_u + columns[None, :], mask=valid, other=0.0)
        if HAS_BIAS:
            u += tl.load(BIAS + v0 + columns, mask=columns < n_columns, other=0.0).to(tl.float32)[None, :]
        z, _ = logits(u, inner, outer, SOFTCAP)
        z = tl.where(valid, z, -float("inf"))
        higher = tl.maximum(peak, z)
        rescale = tl.exp2(peak - higher)
        if ENTROPY:
            below = tl.maximum(z - higher, FLOOR, propagate_nan=tl.PropagateNan.ALL)
            e = tl.exp2(below)
            moment = rescale * (moment + (peak - higher) * total) + e * below
        else:
            e = tl.exp2(z - higher)
        total = total * rescale + e
        peak = higher
    highest = tl.max(peak, 1)
    rescale = tl.exp2(peak - highest[:, None])
    before = tl.load(PEAK + rows, mask=inside, other=0.0)
    after = tl.maximum(before, highest)
    rescale_before = tl.exp2(before - after)
    rescale_here = tl.exp2(highest - after)
    total_before = tl.load(TOTAL + rows, mask=inside, other=0.0)
    total_here = tl.sum(total * rescale, 1)
    if ENTROPY:
        here = tl.sum(rescale * (moment + (peak - highest[:, None]) * total), 1)
        old = tl.load(MOMENT + rows, mask=inside, other=0.0)
        old = rescale_before * (old + (before - after) * total_before)
        tl.store(MOMENT + rows, old + rescale_here * (here + (highest - after) * total_here), mask=inside)
    tl.store(PEAK + rows, after, mask=inside)
    tl.store(TOTAL + rows, total_before * rescale_before + total_here * rescale_here, mask=inside)

    column = tl.load(TARGETS + rows, mask=inside, other=-1).to(tl.int32) - v0
    own = inside & (column >= 0) & (column < n_columns)
    target = tl.load(U + base * stride_u + column, mask=own, other=0.0)
    if HAS_BIAS:
        target += tl.load(BIAS + v0 + column, mask=own, other=0.0).to(tl.float32)
    target, _ = logits(target, inner, outer, SOFTCAP)
    tl.store(TARGET + rows, target, mask=own)

    if STORE:
        tl.store(RESCALE + rows, rescale_before, mask=inside)
        for start in range(0, bound(n_columns, INTERPRETED), BLOCK_N):
            columns = start + offsets
            mask = inside[:, None] & (columns < n_columns)[None, :]
            u = tl.load(U + base[:, None] * stride_u + columns[None, :], mask=mask, other=0.0)
            if HAS_BIAS:
                u += tl.load(BIAS + v0 + columns, mask=columns < n_columns, other=0.0).to(tl.float32)[None, :]
            z, t = logits(u, inner, outer, SOFTCAP)
            e = tl.exp2(z - after[:, None])
            if SOFTCAP:
                e *= 1.0 - t * t
            tl.store(E + base[:, None] * stride_e + columns[None, :], e.to(E.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "v0"])
def dlogits_kernel(
    U,
    BIAS,
    TARGETS,
    LSE,
    ENT,
    G,
    G_ENT,
    DU,
    N,
    v0,
    n_columns,
    stride_u,
    stride_du,
    inner,
    outer,
    slope,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """∂loss/∂u of a chunk [N, n], in place where DU is U."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    base = tl.minimum(rows, N - 1).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = columns < n_columns
    mask = inside[:, None] & valid[None, :]
    u = tl.load(U + base[:, None] * stride_u + columns[None, :], mask=mask, other=0.0)
    if HAS_BIAS:
        u += tl.load(BIAS + v0 + columns, mask=valid, other=0.0).to(tl.float32)[None, :]
    targets = tl.load(TARGETS + rows, mask=inside, other=-1).to(tl.int32)
    lse = tl.load(LSE + rows, mask=inside, other=0.0) * LOG2E
    g = tl.load(G + rows, mask=inside, other=0.0) * slope
    g_entropy = g
    entropy = lse
    if ENTROPY:
        g_entropy = tl.load(G_ENT + rows, mask=inside, other=0.0) * slope
        entropy = tl.load(ENT + rows, mask=inside, other=0.0)
    hit = (v0 + columns)[None, :] == targets[:, None]
    du = dlogits_from(u, hit, lse, entropy, g, g_entropy, inner, outer, SOFTCAP, ENTROPY)
    tl.store(DU + base[:, None] * stride_du + columns[None, :], du.to(DU.dtype.element_ty), mask=mask)
