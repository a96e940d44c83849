"""Per-sequence sums of packed token log-probabilities."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halos_kernels.dispatch import IMPLS, use_triton
from halos_kernels.inputs import require_values


class SeqOut(NamedTuple):
    """What `seq_logratio` returns, all in nats."""

    logratio: Tensor  # [B] Σ (policy − reference) over the sequence's tokens; without a reference, `logp`
    logp: Tensor  # [B] Σ policy
    ref_logp: Tensor | None  # [B] Σ reference


def seq_logratio(logp: Tensor, ref_logp: Tensor | None, cu_seqlens: Tensor, *, impl: str = "auto") -> SeqOut:
    """Log-ratio of policy to reference for each packed sequence: per-token differences, summed in float64.

        logratio[b] = Σ_n (logp[n] − ref_logp[n])   over n in cu_seqlens[b] : cu_seqlens[b + 1]

    A sequence's sums depend on its own tokens only; an empty sequence gives 0, and equal inputs give exactly 0.
    Gradients flow to `logp`, and to `ref_logp` if it requires them.

    Args:
        logp: [N] the policy's token log-probabilities in nats, float32 or float64.
        ref_logp: [N] the reference's, of the same dtype; None without a reference.
        cu_seqlens: [B + 1] integer offsets: starts at 0, never decreases, ends at N.
        impl: "triton", "eager" or "auto", as of `linear_logp`.

    Returns:
        `logratio`, `logp`, `ref_logp` [B] in the inputs' dtype.

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
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    logratio, total, ref_total = sums(logp, ref_logp, cu_seqlens, impl)
    return SeqOut(logratio, total, None if ref_logp is None else ref_total)


@torch.library.custom_op("halos_kernels::seq_logratio", mutates_args=())
def sums(logp: Tensor, ref_logp: Tensor | None, cu_seqlens: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Σ (logp − ref), Σ logp and Σ ref [B] of each sequence; without a reference Σ logp twice, and [0]."""
    count = logp.shape[0]
    require_values(
        (cu_seqlens[0] == 0) & (cu_seqlens[-1] == count) & (cu_seqlens.diff() >= 0).all(),
        lambda: f"cu_seqlens must rise from 0 to logp's length {count}, got {cu_seqlens.tolist()}",
    )
    if use_triton(impl, logp.device):
        from halos_kernels import sequences

        with torch.cuda.device(logp.device) if logp.is_cuda else nullcontext():
            return sequences.sums(logp, ref_logp, cu_seqlens)
    lengths = cu_seqlens.long().diff()

    def total(x: Tensor) -> Tensor:
        return torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True, initial=0.0).to(logp.dtype)

    policy = logp.double()
    if ref_logp is None:
        found = total(policy)
        return found, found.clone(), logp.new_empty(0)
    reference = ref_logp.double()
    return total(policy - reference), total(policy), total(reference)


@sums.register_fake
def _(logp, ref_logp, cu_seqlens, impl):  # type: ignore[no-untyped-def]
    each = [logp.new_empty(cu_seqlens.shape[0] - 1) for _ in range(3)]
    return each[0], each[1], logp.new_empty(0) if ref_logp is None else each[2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logp, ref_logp, cu_seqlens, _ = inputs
    ctx.set_materialize_grads(False)
    if ref_logp is None or not ref_logp.requires_grad:
        ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(cu_seqlens)
    ctx.tokens, ctx.has_reference = logp.shape[0], ref_logp is not None


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Every token of a sequence gets the sequence's gradient."""
    (cu_seqlens,) = ctx.saved_tensors
    ratio, total, ref_total = grads

    def spread(*parts: Tensor | None) -> Tensor | None:
        known = [x for x in parts if x is not None]
        if not known:
            return None
        return torch.repeat_interleave(sum(known[1:], known[0]), cu_seqlens.long().diff(), output_size=ctx.tokens)

    ref = None
    if ctx.has_reference and ctx.needs_input_grad[1]:
        ref = spread(None if ratio is None else -ratio, ref_total)
    return spread(ratio, total) if ctx.needs_input_grad[0] else None, ref, None, None


sums.register_autograd(_backward, setup_context=_save)


def _check(logp: Tensor, ref_logp: Tensor | None, cu_seqlens: Tensor) -> None:
    named = {"logp": logp, "cu_seqlens": cu_seqlens} | ({} if ref_logp is None else {"ref_logp": ref_logp})
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
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
