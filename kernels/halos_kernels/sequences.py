"""Per-sequence sums in one kernel: a program a sequence, a fixed order, float64 throughout."""

from __future__ import annotations

from torch import Tensor

from halos_kernels.dispatch import architecture, tile
from halos_kernels.jit.math import INTERPRET
from halos_kernels.jit.sequences import sums_kernel


def sums(logp: Tensor, ref_logp: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `halos_kernels.ops.seq_logratio`."""
    sequences = cu_seqlens.numel() - 1
    ratio, total, ref_total = (logp.new_empty(sequences) for _ in range(3))
    if sequences:
        sums_kernel[(sequences,)](
            logp.contiguous(),
            logp if ref_logp is None else ref_logp.contiguous(),
            cu_seqlens.contiguous(),
            ratio,
            total,
            ref_total,
            HAS_REF=ref_logp is not None,
            INTERPRETED=INTERPRET,
            **tile("sums", architecture(logp.device)),
        )
    return (total.clone(), total, logp.new_empty(0)) if ref_logp is None else (ratio, total, ref_total)
