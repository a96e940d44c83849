"""The custom operators behind the public functions: what autograd, `torch.compile` and fake tensors see.

Each takes `impl` as the caller gave it and resolves it when it runs, so that nothing about the machine is traced.
An absent entropy or gradient is a tensor of no elements: operators cannot return None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from halos_kernels.chunks import gradients
from halos_kernels.dispatch import forward_multi, implementation, use_triton
from halos_kernels.inputs import Inputs, Transform, Upstream, check_targets, require_values

Gradients = tuple[Tensor | None, ...]


@torch.library.custom_op("halos_kernels::linear_logp", mutates_args=())
def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    entropy: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse and entropy [N] (or [0])."""
    check_targets(targets, weight.shape[0])
    inputs = _inputs(hidden, weight, bias, targets, scale, softcap, temperature)
    with _computing(hidden):
        out = implementation(impl, inputs).forward(inputs, entropy=entropy)
    return out.logp, out.lse, out.logp.new_empty(0) if out.entropy is None else out.entropy


@linear_logp.register_fake
def _(hidden, weight, bias, targets, scale, softcap, temperature, entropy, impl):  # type: ignore[no-untyped-def]
    logp = _empty_logp(hidden, weight, bias)
    return logp, torch.empty_like(logp), torch.empty_like(logp) if entropy else logp.new_empty(0)


@torch.library.custom_op("halos_kernels::linear_logp_backward", mutates_args=())
def linear_logp_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    needed: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (or [0] where not needed)."""
    inputs = _inputs(hidden, weight, bias, targets, scale, softcap, temperature)
    lse = lse.contiguous()
    upstream = Upstream(
        lse,
        torch.zeros_like(lse) if grad_logp is None else grad_logp.contiguous(),  # a sum's is one number, expanded
        entropy.contiguous() if entropy.numel() else lse,
        grad_entropy.contiguous() if grad_entropy is not None and entropy.numel() else None,
    )
    with _computing(hidden):
        chunks = implementation(impl, inputs).dlogits(inputs, upstream)
        found = gradients(inputs, chunks, (needed[0], needed[1], needed[2]))
    first, second, third = (hidden.new_empty(0) if x is None else x for x in found)
    return first, second, third


@linear_logp_backward.register_fake
def _(hidden, weight, bias, targets, lse, entropy, grad_logp, grad_entropy, scale, softcap, temperature, needed, impl):  # type: ignore[no-untyped-def]
    inputs = (hidden, weight, hidden if bias is None else bias)
    return tuple(x.new_empty(x.shape) if need else hidden.new_empty(0) for x, need in zip(inputs, needed, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, scale, softcap, temperature, _, impl = inputs
    _, lse, entropy = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
    ctx.settings = (scale, softcap, temperature, impl)


def _backward(ctx: Any, grad_logp: Tensor | None, _: Tensor | None, grad_entropy: Tensor | None) -> Gradients:
    if grad_logp is None and grad_entropy is None:
        return (None,) * 9
    hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
    scale, softcap, temperature, impl = ctx.settings
    needed = list(ctx.needs_input_grad[:3])
    found = linear_logp_backward(
        hidden, weight, bias, targets, lse, entropy, grad_logp, grad_entropy, scale, softcap, temperature, needed, impl
    )
    return *(x if need else None for x, need in zip(found, needed, strict=True)), *(None,) * 6


linear_logp.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("halos_kernels::linear_logp_frozen", mutates_args=())
def linear_logp_frozen(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp and lse [N], and ∂logp/∂hidden [N, d]: the weight and bias get no gradient."""
    check_targets(targets, weight.shape[0])
    inputs = _inputs(hidden, weight, bias, targets, scale, softcap, temperature)
    with _computing(hidden):
        logp, lse, slopes = implementation(impl, inputs).forward_frozen(inputs)
    return logp, lse, slopes


@linear_logp_frozen.register_fake
def _(hidden, weight, bias, targets, scale, softcap, temperature, impl):  # type: ignore[no-untyped-def]
    logp = _empty_logp(hidden, weight, bias)
    return logp, torch.empty_like(logp), hidden.new_empty(hidden.shape)


@torch.library.custom_op("halos_kernels::scale_rows", mutates_args=())
def scale_rows(rows: Tensor, factor: Tensor) -> Tensor:
    """rows [N, d] · factor [N], in the dtype of rows. An operator without a gradient: a second backward raises."""
    return (rows * factor[:, None]).to(rows.dtype)


@scale_rows.register_fake
def _(rows, factor):  # type: ignore[no-untyped-def]
    return rows.new_empty(rows.shape)


def _save_frozen(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, slopes = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)  # not `slopes`, so that a second backward asks for the gradient that is not there
    ctx.save_for_backward(slopes)


def _backward_frozen(ctx: Any, grad_logp: Tensor | None, *_: Tensor | None) -> Gradients:
    (slopes,) = ctx.saved_tensors
    return None if grad_logp is None else scale_rows(slopes, grad_logp), *(None,) * 7


linear_logp_frozen.register_autograd(_backward_frozen, setup_context=_save_frozen)


@torch.library.custom_op("halos_kernels::linear_logp_multi", mutates_args=())
def linear_logp_multi(
    hiddens: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    targets: Tensor,
    scales: Sequence[float],
    softcaps: Sequence[float],
    temperatures: Sequence[float],
    entropy: bool,
    impl: str,
) -> list[Tensor]:
    """logp, lse and, if asked for, entropy [N] of one head after another. A softcap of 0 is none."""
    rest = zip(hiddens, weights, biases, scales, softcaps, temperatures, strict=True)
    for i, weight in enumerate(weights):
        try:
            check_targets(targets, weight.shape[0])
        except ValueError as error:
            raise ValueError(f"heads[{i}]: {error}") from None
    calls = [_inputs(h, w, b, targets, scale, softcap or None, t) for h, w, b, scale, softcap, t in rest]
    with _computing(targets):
        outs = forward_multi(impl, calls, entropy=entropy)
    return [x for out in outs for x in out if x is not None]


@linear_logp_multi.register_fake
def _(hiddens, weights, biases, targets, scales, softcaps, temperatures, entropy, impl):  # type: ignore[no-untyped-def]
    heads = zip(hiddens, weights, biases, strict=True)
    return [torch.empty_like(logp) for logp in (_empty_logp(*head) for head in heads) for _ in range(2 + entropy)]


@torch.library.custom_op("halos_kernels::seq_logratio", mutates_args=())
def seq_logratio(logp: Tensor, ref_logp: Tensor | None, cu_seqlens: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Σ (logp − ref), Σ logp and Σ ref [B] of each sequence; without a reference Σ logp twice, and [0]."""
    count = logp.shape[0]
    require_values(
        (cu_seqlens[0] == 0) & (cu_seqlens[-1] == count) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all(),
        lambda: f"cu_seqlens must rise from 0 to logp's length {count}, got {cu_seqlens.tolist()}",
    )
    if use_triton(impl, logp.device):
        from halos_kernels import sequences

        with _computing(logp):
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


@seq_logratio.register_fake
def _(logp, ref_logp, cu_seqlens, impl):  # type: ignore[no-untyped-def]
    each = [logp.new_empty(cu_seqlens.shape[0] - 1) for _ in range(3)]
    return each[0], each[1], logp.new_empty(0) if ref_logp is None else each[2]


def _save_sequences(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logp, ref_logp, cu_seqlens, _ = inputs
    ctx.set_materialize_grads(False)
    if ref_logp is None or not ref_logp.requires_grad:
        ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(cu_seqlens)
    ctx.tokens, ctx.has_reference = logp.shape[0], ref_logp is not None


def _backward_sequences(ctx: Any, *grads: Tensor | None) -> Gradients:
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


seq_logratio.register_autograd(_backward_sequences, setup_context=_save_sequences)


def _inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
) -> Inputs:
    vectors = (None if bias is None else bias.contiguous(), targets.contiguous())
    return Inputs(hidden, weight, *vectors, Transform(scale, softcap, temperature), hidden.shape[0])


def _empty_logp(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = Inputs(hidden, weight, bias, hidden, Transform(), 0).dtype
    return hidden.new_empty(hidden.shape[0], dtype=dtype)


@contextmanager
def _computing(x: Tensor) -> Iterator[None]:
    """Without autocast, and on the device of `x`: Triton launches on the current one."""
    device = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    with torch.autocast(x.device.type, enabled=False), device:
        yield
