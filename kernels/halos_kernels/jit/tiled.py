"""Kernels of the strategy "tiled": logits live in registers only. A program owns a block of rows and a split of the
vocabulary.

The splits depend on nothing but the vocabulary, and a row's sums on nothing but the row: its log-probability is bitwise
the same in any batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from halos_kernels.jit.math import FLOOR, LOG2E, LOWEST, bound, dlogits_from, logits


@triton.jit
def product_tile(
    H,
    W,
    m0,
    n0,
    N,
    V,
    D: tl.constexpr,
    stride_h,
    stride_w,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden[m0:] @ weight[n0:].T in float32. Of rows past the end come other numbers: whoever calls drops them."""
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS:
        for k in range(0, D, BLOCK_D):
            h = H.load([m0, k])
            w = W.load([n0, k])
            if INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            u = tl.dot(h, tl.trans(w), u, input_precision="ieee")
    else:
        k_offsets = tl.arange(0, BLOCK_D)
        # vocabulary × width can pass 2³¹
        h_rows = tl.minimum(m0 + tl.arange(0, BLOCK_M), N - 1).to(tl.int64)
        w_rows = tl.minimum(n0 + tl.arange(0, BLOCK_N), V - 1).to(tl.int64)
        h_pointers = H + h_rows[:, None] * stride_h + k_offsets[None, :]
        w_pointers = W + w_rows[:, None] * stride_w + k_offsets[None, :]
        for k in range(0, D, BLOCK_D):
            if D % BLOCK_D == 0:
                h = tl.load(h_pointers)
                w = tl.load(w_pointers)
            else:
                left = (k_offsets < D - k)[None, :]
                h = tl.load(h_pointers, mask=left, other=0.0)
                w = tl.load(w_pointers, mask=left, other=0.0)
            if INTERPRETED:
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            u = tl.dot(h, tl.trans(w), u, input_precision="ieee")
            h_pointers += BLOCK_D
            w_pointers += BLOCK_D
    return u


@triton.jit
def place(pid, blocks_m, blocks_n, GROUP: tl.constexpr):
    """Programs in groups of rows, rows fastest: neighbours share a tile of the weight in the cache."""
    group = pid // (GROUP * blocks_n)
    size = tl.minimum(blocks_m - group * GROUP, GROUP)
    within = pid % (GROUP * blocks_n)
    return group * GROUP + within % size, within // size


@triton.jit
def split_statistics(
    H,
    W,
    BIAS,
    TARGETS,
    PEAK,
    TOTAL,
    MOMENT,
    TARGET,
    E,
    TILE_PEAK,
    N,
    V,
    D: tl.constexpr,
    split0,
    splits,
    stride_h,
    stride_w,
    stride_e,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    STORE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
):
    """Statistics of a block of rows over a split of the vocabulary, tile after tile; of the target, its logit.

    With STORE also exp(z − peak so far) · slope of the cap into E, and that peak into TILE_PEAK.
    """
    block, split = place(tl.program_id(0), tl.cdiv(N, BLOCK_M), splits, GROUP)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    targets = tl.load(TARGETS + rows, mask=inside, other=-1).to(tl.int32)
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)
    target = tl.zeros((BLOCK_M,), tl.float32)
    first = (split0 + split) * TILES
    last = tl.minimum(first + TILES, tl.cdiv(V, BLOCK_N))
    for i in range(bound(first, INTERPRETED), bound(last, INTERPRETED)):
        columns = i * BLOCK_N + tl.arange(0, BLOCK_N)
        u = product_tile(
            H, W, block * BLOCK_M, i * BLOCK_N, N, V, D, stride_h, stride_w,
            DESCRIPTORS, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if HAS_BIAS:
            u += tl.load(BIAS + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        z, t = logits(u, inner, outer, SOFTCAP)
        z = tl.where((columns < V)[None, :], z, -float("inf"))
        target += tl.sum(tl.where(columns[None, :] == targets[:, None], z, 0.0), 1)
        higher = tl.maximum(peak, tl.max(z, 1))
        rescale = tl.exp2(peak - higher)
        if ENTROPY:
            below = tl.maximum(z - higher[:, None], FLOOR, propagate_nan=tl.PropagateNan.ALL)
            e = tl.exp2(below)
            moment = rescale * (moment + (peak - higher) * total) + tl.sum(e * below, 1)
        else:
            e = tl.exp2(z - higher[:, None])
        total = total * rescale + tl.sum(e, 1)
        peak = higher
        if STORE:
            if SOFTCAP:
                e *= 1.0 - t * t
            column = columns - split0 * TILES * BLOCK_N
            pointers = E + rows[:, None] * stride_e + column[None, :]  # a workspace is smaller than 2³¹
            tl.store(pointers, e.to(E.dtype.element_ty), mask=inside[:, None])  # whole tiles: 0 past the vocabulary
            tl.store(TILE_PEAK + (i - split0 * TILES) * N + rows, peak, mask=inside)
    offset = (split0 + split).to(tl.int64) * N
    tl.store(PEAK + offset + rows, peak, mask=inside)
    tl.store(TOTAL + offset + rows, total, mask=inside)
    if ENTROPY:
        tl.store(MOMENT + offset + rows, moment, mask=inside)
    # one split holds the target's column: a plain store, no atomics
    own = (targets >= first * BLOCK_N) & (targets < last * BLOCK_N)
    tl.store(TARGET + rows, target, mask=inside & own)


@triton.jit(do_not_specialize=["N", "split0", "splits", "all_splits"])
def statistics_kernel(
    H0,
    W0,
    BIAS0,
    H1,
    W1,
    BIAS1,
    TARGETS,
    PEAK,
    TOTAL,
    MOMENT,
    TARGET,
    E,
    TILE_PEAK,
    N,
    V,
    split0,
    splits,
    all_splits,
    stride_h,
    stride_w,
    stride_e,
    inner,
    outer,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    STORE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
):
    """Softmax statistics of one block of rows over one split of the vocabulary, for each head."""
    if HEADS == 1:
        split_statistics(
            H0, W0, BIAS0, TARGETS, PEAK, TOTAL, MOMENT, TARGET, E, TILE_PEAK, N, V, D, split0, splits,
            stride_h, stride_w, stride_e, inner, outer, HAS_BIAS, SOFTCAP, ENTROPY, STORE,
            DESCRIPTORS, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_D, GROUP, TILES,
        )  # fmt: skip
    else:
        if tl.program_id(1) == 0:
            split_statistics(
                H0, W0, BIAS0, TARGETS, PEAK, TOTAL, MOMENT, TARGET, E, TILE_PEAK, N, V, D, split0, splits,
                stride_h, stride_w, stride_e, inner, outer, HAS_BIAS, SOFTCAP, ENTROPY, STORE,
                DESCRIPTORS, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_D, GROUP, TILES,
            )  # fmt: skip
        else:
            second = all_splits.to(tl.int64) * N
            split_statistics(
                H1, W1, BIAS1, TARGETS, PEAK + second, TOTAL + second, MOMENT + second, TARGET + N, E, TILE_PEAK,
                N, V, D, split0, splits, stride_h, stride_w, stride_e, inner, outer, HAS_BIAS, SOFTCAP, ENTROPY, STORE,
                DESCRIPTORS, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_D, GROUP, TILES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def rescale_kernel(E, TILE_PEAK, PEAK, N, n_columns, stride_e, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Exponentials [N, n] from their tile's peak to the chunk's."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    before = tl.load(TILE_PEAK + tl.program_id(1) * N + rows, mask=inside, other=0.0)
    factor = tl.exp2(before - tl.load(PEAK + rows, mask=inside, other=0.0))
    pointers = E + rows[:, None] * stride_e + columns[None, :]
    mask = inside[:, None] & (columns < n_columns)[None, :]
    e = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, (e * factor[:, None]).to(E.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "v0"])
def dlogits_kernel(
    H,
    W,
    BIAS,
    TARGETS,
    LSE,
    ENT,
    G,
    G_ENT,
    DU,
    N,
    V,
    v0,
    n_columns,
    stride_h,
    stride_w,
    stride_du,
    inner,
    outer,
    slope,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of logits again, and its gradient straight into the chunk [N, n]."""
    block, part = place(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(n_columns, BLOCK_N), GROUP)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    column = part * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = v0 + column
    u = product_tile(
        H, W, block * BLOCK_M, v0 + part * BLOCK_N, N, V, D, stride_h, stride_w,
        DESCRIPTORS, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if HAS_BIAS:
        u += tl.load(BIAS + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    targets = tl.load(TARGETS + rows, mask=inside, other=-1).to(tl.int32)
    lse = tl.load(LSE + rows, mask=inside, other=0.0) * LOG2E
    g = tl.load(G + rows, mask=inside, other=0.0) * slope
    g_entropy = g
    entropy = lse
    if ENTROPY:
        g_entropy = tl.load(G_ENT + rows, mask=inside, other=0.0) * slope
        entropy = tl.load(ENT + rows, mask=inside, other=0.0)
    hit = columns[None, :] == targets[:, None]
    du = dlogits_from(u, hit, lse, entropy, g, g_entropy, inner, outer, SOFTCAP, ENTROPY)
    pointers = DU + rows[:, None] * stride_du + column[None, :]  # a workspace is smaller than 2³¹
    tl.store(pointers, du.to(DU.dtype.element_ty), mask=inside[:, None] & (column < n_columns)[None, :])
