"""The kernel that merges partial softmax statistics into log-probabilities."""

from __future__ import annotations

import triton
import triton.language as tl

from halos_kernels.jit.math import LN2, LOWEST, bound


@triton.jit(do_not_specialize=["N", "S"])
def merge_kernel(
    PEAK,
    TOTAL,
    MOMENT,
    TARGET,
    LOGP,
    LSE,
    ENT,
    N,
    S,
    ENTROPY: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All partials of a block of rows into outputs in nats, split after split."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    stride = N.to(tl.int64)
    peak = tl.full((BLOCK,), LOWEST, tl.float32)
    for s in range(bound(S, INTERPRETED)):
        peak = tl.maximum(peak, tl.load(PEAK + s * stride + rows, mask=inside, other=0.0))
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for s in range(bound(S, INTERPRETED)):
        drop = tl.load(PEAK + s * stride + rows, mask=inside, other=0.0) - peak
        rescale = tl.exp2(drop)
        part = tl.load(TOTAL + s * stride + rows, mask=inside, other=1.0)
        total += rescale * part
        if ENTROPY:
            moment += rescale * (tl.load(MOMENT + s * stride + rows, mask=inside, other=0.0) + drop * part)
    log_total = tl.log2(total)
    target = tl.load(TARGET + rows, mask=inside, other=0.0)
    # not target − lse, whose rounding grows with the logits' magnitude
    tl.store(LOGP + rows, ((target - peak) - log_total) * LN2, mask=inside)
    tl.store(LSE + rows, (peak + log_total) * LN2, mask=inside)
    if ENTROPY:
        tl.store(ENT + rows, (log_total - moment / total) * LN2, mask=inside)
