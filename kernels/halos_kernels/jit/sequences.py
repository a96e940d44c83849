"""The kernel of `seq_logratio`."""

from __future__ import annotations

import triton
import triton.language as tl

from halos_kernels.jit.math import bound


@triton.jit
def sums_kernel(
    LOGP,
    REF,
    CU,
    RATIO,
    SUM,
    REF_SUM,
    HAS_REF: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ (logp − ref), Σ logp and Σ ref over the tokens of one sequence."""
    sequence = tl.program_id(0)
    first = tl.load(CU + sequence)
    last = tl.load(CU + sequence + 1)
    ratio = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    ref_total = tl.zeros((BLOCK,), tl.float64)
    for start in range(bound(first, INTERPRETED), bound(last, INTERPRETED), BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        mask = tokens < last
        logp = tl.load(LOGP + tokens, mask=mask, other=0.0).to(tl.float64)
        total += logp
        if HAS_REF:
            ref = tl.load(REF + tokens, mask=mask, other=0.0).to(tl.float64)
            ref_total += ref
            ratio += logp - ref
    tl.store(SUM + sequence, tl.sum(total, 0).to(SUM.dtype.element_ty))
    if HAS_REF:
        tl.store(REF_SUM + sequence, tl.sum(ref_total, 0).to(REF_SUM.dtype.element_ty))
        tl.store(RATIO + sequence, tl.sum(ratio, 0).to(RATIO.dtype.element_ty))
