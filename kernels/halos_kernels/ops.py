"""The custom operators behind `linear_logp`: what autograd, `torch.compile` and fake tensors see.

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
from halos_kernels.dispatch import forward_multi, implementation
from halos_kernels.inputs import Inputs, Transform, check_targets

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
    inputs = _inputs(hidden, weight, bias, targets, scale, softcap, temperature, checked=True)
    if not entropy.numel():
        grad_entropy = None  # or nothing, expanded
    with _computing(hidden):
        chunks = implementation(impl, inputs).dlogits(
            inputs,
            lse.contiguous(),
            entropy.contiguous() if entropy.numel() else None,
            None if grad_logp is None else grad_logp.contiguous(),  # that of a sum is one number, expanded
            None if grad_entropy is None else grad_entropy.contiguous(),
        )
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
    inputs = _inputs(hidden, weight, bias, targets, scale, softcap, temperature)
    with _computing(hidden):
        logp, lse, pull = implementation(impl, inputs).forward_frozen(inputs)
    return logp, lse, pull


@linear_logp_frozen.register_fake
def _(hidden, weight, bias, targets, scale, softcap, temperature, impl):  # type: ignore[no-untyped-def]
    logp = _empty_logp(hidden, weight, bias)
    return logp, torch.empty_like(logp), hidden.new_empty(hidden.shape)


@torch.library.custom_op("halos_kernels::scale_rows", mutates_args=())
def scale_rows(rows: Tensor, factor: Tensor) -> Tensor:
    """rows [N, d] · factor [N], in the dtype of rows. An operator, so that a second backward raises."""
    return (rows * factor[:, None]).to(rows.dtype)


@scale_rows.register_fake
def _(rows, factor):  # type: ignore[no-untyped-def]
    return rows.new_empty(rows.shape)


def _save_frozen(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, pull = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, pull)
    ctx.save_for_backward(pull)


def _backward_frozen(ctx: Any, grad_logp: Tensor | None, *_: Tensor | None) -> Gradients:
    (pull,) = ctx.saved_tensors
    return None if grad_logp is None else scale_rows(pull, grad_logp), *(None,) * 7


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
    calls = [_inputs(h, w, b, targets, scale, softcap or None, t) for h, w, b, scale, softcap, t in rest]
    with _computing(targets):
        outs = forward_multi(impl, calls, entropy=entropy)
    return [x for out in outs for x in out if x is not None]


@linear_logp_multi.register_fake
def _(hiddens, weights, biases, targets, scales, softcaps, temperatures, entropy, impl):  # type: ignore[no-untyped-def]
    heads = zip(hiddens, weights, biases, strict=True)
    return [torch.empty_like(logp) for logp in (_empty_logp(*head) for head in heads) for _ in range(2 + entropy)]


def _inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    *,
    checked: bool = False,
) -> Inputs:
    if not checked:
        check_targets(targets, weight.shape[0])
    vectors = (None if bias is None else bias.contiguous(), targets.contiguous())
    return Inputs(hidden, weight, *vectors, Transform(scale, softcap, temperature))


def _empty_logp(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = Inputs(hidden, weight, bias, hidden, Transform()).dtype
    return hidden.new_empty(hidden.shape[0], dtype=dtype)


@contextmanager
def _computing(x: Tensor) -> Iterator[None]:
    """Without autocast, and on the device of `x`: Triton launches on the current one."""
    device = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    with torch.autocast(x.device.type, enabled=False), device:
        yield
