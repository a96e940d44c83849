"""Per-sequence sums of packed token log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from halos_kernels import ops
from halos_kernels.dispatch import check_impl
from halos_kernels.inputs import refuse_tangent


class SeqOut(NamedTuple):
    """What `seq_logratio` returns, all in nats."""

    logratio: Tensor  # [B] Σ (policy − reference) over the sequence's tokens; without a reference, `logp`
    logp: Tensor  # [B] Σ policy
    ref_logp: Tensor | None  # [B] Σ reference


def seq_logratio(logp: Tensor, ref_logp: Tensor | None, cu_seqlens: Tensor, *, impl: str = "auto") -> SeqOut:
    """Log-ratio of policy to reference for each packed sequence: per-token differences, summed in float64.

        logratio[b] = Σ_n (logp[n] − ref_logp[n])   over n in cu_seqlens[b] : cu_seqlens[b + 1]

    A sequence's sums depend on its own tokens only; an empty sequence gives 0, and equal finite inputs give exactly 0.
    Gradients flow to `logp`, and to `ref_logp` if it requires them.

    Args:
        logp: [N] the policy's token log-probabilities in nats, float32 or float64.
        ref_logp: [N] the reference's, of the same dtype; None without a reference.
        cu_seqlens: [B + 1] integer offsets: starts at 0, never decreases, ends at N.
        impl: "triton", "eager" or "auto", as of `linear_logp`.

    Returns:
        `logratio`, `logp`, `ref_logp` [B] in the inputs' dtype. Without a reference `logratio` equals `logp`, and
        `ref_logp` is None.

    Raises:
        ValueError: on any other shape, dtype or device, naming the argument and what it got. Half precision is refused:
            a rounded log-probability has already lost the ratio. Offsets are checked on the CPU; on CUDA they trip a
            device-side assertion, or this error too with `HALOS_CHECK=1` in the environment.

    Example:
        >>> import torch
        >>> policy, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -1.0])
        >>> seq_logratio(policy, reference, torch.tensor([0, 2, 2, 3])).logratio.tolist()
        [0.5, 0.0, -2.0]
    """
    _check(logp, ref_logp, cu_seqlens)
    check_impl(impl)
    logratio, total, ref_total = ops.seq_logratio(logp, ref_logp, cu_seqlens, impl)
    return SeqOut(logratio, total, None if ref_logp is None else ref_total)


def _check(logp: Tensor, ref_logp: Tensor | None, cu_seqlens: Tensor) -> None:
    named = {"logp": logp, "cu_seqlens": cu_seqlens} | ({} if ref_logp is None else {"ref_logp": ref_logp})
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        refuse_tangent(name, x)
        if hasattr(x, "placements"):
            raise ValueError(f"{name} must be a plain tensor, got a DTensor: gather it first (`full_tensor`)")
        if x.ndim != 1:
            raise ValueError(f"{name} must have one dimension, got {list(x.shape)}")
        if x.device != logp.device:
            raise ValueError(f"{name} must be on logp's device {logp.device}, got {x.device}")
    if logp.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logp must be float32 or float64, got {logp.dtype}")
    if ref_logp is not None and (ref_logp.shape, ref_logp.dtype) != (logp.shape, logp.dtype):
        raise ValueError(
            f"ref_logp must be {list(logp.shape)} {logp.dtype} like logp, got {list(ref_logp.shape)} {ref_logp.dtype}"
        )
    if cu_seqlens.dtype not in (torch.int64, torch.int32) or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens must be int64 or int32 [B + 1], got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
