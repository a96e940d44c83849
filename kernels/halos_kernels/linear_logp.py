"""Log-probabilities of targets straight from hidden states: no tensor of tokens × vocabulary exists at any time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WORKSPACE_BYTES = 64 << 20
"""Bound of one chunk of logits (and of one upcast chunk of the weight); up to three such buffers live at a time."""

_HALF = (torch.bfloat16, torch.float16)
_FLOATS = (*_HALF, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOOR = -1e4  # exp(_FLOOR) is 0 in every dtype here, and unlike -inf it survives a product with that 0


class LogpOut(NamedTuple):
    """What `linear_logp` returns, all in nats."""

    logp: Tensor  # [N] log-probability of the target
    lse: Tensor  # [N] log-sum-exp of the logits; carries no gradient
    entropy: Tensor | None  # [N] of the next-token distribution, where asked for


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    impl: str = "auto",
) -> LogpOut:
    """Log-probability of each target under the output layer, from one chunk of the vocabulary after another.

        u    = (hidden @ weight.T + bias) · logit_scale
        z    = u / temperature,  or  softcap · tanh(u / softcap) / temperature
        logp = z[target] − logsumexp(z)           entropy = logsumexp(z) − Σ softmax(z) · z

    Logits are never rounded below float32: half-precision inputs are multiplied into float32 sums that stay float32,
    also under autocast. (float32 inputs follow `torch.set_float32_matmul_precision`.) Inputs of different dtypes, as
    mixed precision hands them, are computed in the promoted one. Equal inputs give bitwise equal outputs, with
    gradients or without: where policy and reference agree, their log-ratio is exactly 0.

    Gradients flow from `logp` and `entropy` to `hidden`, `weight` and `bias`, once (no double backward); `lse` carries
    none. The backward recomputes the logits and forms ∂logp/∂z = 1[target] − softmax(z) chunk by chunk, so what is
    saved is the inputs, `lse` and `entropy`. The gradient of `hidden` is summed in float32; that of `weight` is written
    once, in the weight's dtype. On CUDA with both in one half-precision dtype, the logits' gradient is rounded to that
    dtype before these two products.

    Args:
        hidden: [N, d] hidden states, each the predictor of one target.
        weight: [V, d] rows of the output layer. Unsharded: a DTensor is refused.
        targets: [N] integers in [0, V).
        bias: [V], -inf where a token is forbidden.
        logit_scale: Multiplies the logits, bias included.
        softcap: Bound of the logits' magnitude, > 0.
        temperature: > 0; applied last.
        entropy: Whether to compute the entropies.
        impl: "auto" or "eager" (PyTorch operators; the only one so far).

    Returns:
        `logp`, `lse` and `entropy` [N] in nats: float64 if any of hidden, weight, bias is, else float32.

    Raises:
        ValueError: on a shape, dtype, device, number or `impl` other than the above, naming the argument and what it
            got. Targets out of range raise it on the CPU; on CUDA they trip a device-side assertion, or this error too
            with `HALOS_CHECK=1` in the environment (which waits for the device at each call).

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(3, 8, requires_grad=True), torch.ones(4, 8)
        >>> out = linear_logp(hidden, weight, torch.tensor([0, 1, 3]), entropy=True)
        >>> out.logp.exp().tolist()  # four tokens, all alike
        [0.25, 0.25, 0.25]
        >>> out.logp.sum().backward()
        >>> hidden.grad.shape
        torch.Size([3, 8])
    """
    if impl not in ("auto", "eager"):
        reason = "the Triton kernels are not part of this version" if impl == "triton" else "no such implementation"
        raise ValueError(f"impl must be 'auto' or 'eager', got {impl!r}: {reason}")
    _check(hidden, weight, targets, bias)
    _check_number("logit_scale", logit_scale, positive=False)
    _check_number("temperature", temperature)
    if softcap is not None:
        _check_number("softcap", softcap)
    head = _Head(float(logit_scale), softcap, float(temperature))
    return LogpOut(*_LinearLogp.apply(hidden, weight, bias, targets.long(), head, entropy))


class _Head(NamedTuple):
    """How a logit follows from u₀ = hidden @ weight.T + bias."""

    scale: float
    softcap: float | None
    temperature: float

    def apply_(self, z: Tensor) -> Tensor:
        if self.softcap is not None:
            return z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        factor = self.scale / self.temperature
        return z if factor == 1.0 else z.mul_(factor)

    def cap_slope(self, z: Tensor) -> Tensor | None:
        """1 − tanh², from the finished logits; None without a softcap. The rest of ∂z/∂u₀ is scale / temperature."""
        if self.softcap is None:
            return None
        return (z * (self.temperature / self.softcap)).square_().neg_().add_(1.0)


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head, entropy: bool
    ) -> LogpOut:
        out = _forward(hidden, weight, bias, targets, head, entropy)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out.lse)
        ctx.save_for_backward(hidden, weight, bias, targets, out.lse, out.entropy)
        ctx.head = head
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logp, _, grad_entropy = grads
        if grad_logp is None and grad_entropy is None:
            return (None,) * 6
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            needed = ctx.needs_input_grad[:3]
            inputs = _backward(hidden, weight, bias, targets, lse, entropy, ctx.head, grad_logp, grad_entropy, needed)
        return *inputs, None, None, None


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head, entropy: bool
) -> LogpOut:
    dtype = _accumulator(hidden, weight, bias)
    peak = hidden.new_full(targets.shape, torch.finfo(dtype).min, dtype=dtype)  # running maximum, finite
    total, moment = torch.zeros_like(peak), torch.zeros_like(peak)  # Σ exp(z − peak), Σ exp(z − peak)·(z − peak)
    target_z = torch.full_like(peak, math.nan)
    for columns, _, z in _logit_chunks(_operand(hidden, weight, dtype), hidden, weight, bias, head):
        column, inside = _locate(targets, columns)
        target_z = torch.where(inside, z.gather(1, column[:, None])[:, 0], target_z)
        higher = torch.maximum(peak, z.amax(1))
        fall = peak - higher
        z.sub_(higher[:, None])
        if entropy:
            exp_z = z.clamp_(min=_FLOOR).exp()
            moment = fall.exp() * (moment + fall * total) + z.mul_(exp_z).sum(1)
        else:
            exp_z = z.exp_()
        total = total * fall.exp() + exp_z.sum(1)
        peak = higher
    log_total = total.log()
    logp = (target_z - peak) - log_total  # not z − lse, whose rounding grows with the logits' magnitude
    return LogpOut(logp, peak + log_total, log_total - moment / total if entropy else None)


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    head: _Head,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    factor = head.scale / head.temperature
    g = torch.zeros_like(lse) if grad_logp is None else grad_logp * factor
    h = _operand(hidden, weight, lse.dtype)
    grad_h = torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device) if needed[0] else None
    grad_w = torch.empty_like(weight, memory_format=torch.contiguous_format) if needed[1] else None
    grad_b = torch.empty_like(bias) if bias is not None and needed[2] else None
    for columns, w, z in _logit_chunks(h, hidden, weight, bias, head):
        slope = head.cap_slope(z)
        z.sub_(lse[:, None])
        if grad_entropy is not None and entropy is not None:  # ∂entropy/∂z = −p·(log p + entropy)
            pull = z.clamp_(min=_FLOOR).add(entropy[:, None]).mul_(grad_entropy[:, None] * factor).add_(g[:, None])
            z.exp_().mul_(pull).neg_()
        else:
            z.exp_().mul_(-g[:, None])
        column, inside = _locate(targets, columns)
        z.scatter_add_(1, column[:, None], torch.where(inside, g, 0.0)[:, None])
        if slope is not None:
            z.mul_(slope)
        if grad_b is not None:
            grad_b[columns] = z.sum(0)
        dz = z.to(h.dtype)
        if grad_h is not None and h.dtype == grad_h.dtype:
            grad_h.addmm_(dz, w)
        elif grad_h is not None:
            torch.addmm(grad_h, dz, w, out_dtype=grad_h.dtype, out=grad_h)
        if grad_w is not None and h.dtype == grad_w.dtype:
            torch.mm(dz.t(), h, out=grad_w[columns])
        elif grad_w is not None:
            grad_w[columns] = torch.mm(dz.t(), h)
    return None if grad_h is None else grad_h.to(hidden.dtype), grad_w, grad_b


def _logit_chunks(
    h: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: _Head
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Columns, weight rows [n, d] and finished logits [N, n] of each vocabulary chunk; the logits' buffer is reused.

    Products into `out=` are exempt from autocast.
    """
    dtype = _accumulator(hidden, weight, bias)
    vocabulary = weight.shape[0]
    width = max(1, WORKSPACE_BYTES // (dtype.itemsize * max(1, *hidden.shape)))
    chunks = max(2, math.ceil(vocabulary / width))
    width = math.ceil(vocabulary / chunks)
    buffer = torch.empty(hidden.shape[0], width, dtype=dtype, device=hidden.device)
    for start in range(0, vocabulary, width):
        columns = slice(start, min(start + width, vocabulary))
        w = weight[columns].to(h.dtype)
        z = buffer[:, : w.shape[0]]
        if h.dtype == dtype:
            torch.mm(h, w.t(), out=z)
        else:
            torch.mm(h, w.t(), out_dtype=dtype, out=z)
        if bias is not None:
            z.add_(bias[columns])
        yield columns, w, head.apply_(z)


def _accumulator(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of logits and outputs."""
    dtypes = (x.dtype for x in (hidden, weight, bias) if x is not None)
    return reduce(torch.promote_types, dtypes, torch.float32)


def _operand(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`hidden` as it enters the products: as it is where the device multiplies half precision into float32."""
    native = hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in _HALF and dtype == torch.float32
    return hidden if native else hidden.to(dtype)


def _locate(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each target's column within the chunk (clamped into it), and whether the chunk holds it."""
    local = targets - columns.start
    column = local.clamp(0, columns.stop - columns.start - 1)
    return column, column == local


def require_values(ok: Tensor, message: Callable[[], str]) -> None:
    """Raises ValueError if `ok` (0-d bool) is false; on CUDA asserts on the device instead, unless `HALOS_CHECK=1`."""
    if ok.is_cuda and os.environ.get("HALOS_CHECK") != "1":
        torch._assert_async(ok, "halos_kernels: value out of range; run with HALOS_CHECK=1 to see which")
    elif not ok:
        raise ValueError(message())


def _check_number(name: str, value: object, *, positive: bool = True) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (positive and not value > 0):  # type: ignore[operator]
        raise ValueError(f"{name} must be a finite number{' > 0' if positive else ''}, got {value!r}")


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    floats = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, x in {**floats, "targets": targets}.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if hasattr(x, "placements"):
            raise ValueError(f"{name} must be a plain tensor, got a DTensor: gather it first (`full_tensor`)")
        if x.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {x.device}")
        allowed = _INTEGERS if name == "targets" else _FLOATS
        if x.dtype not in allowed:
            raise ValueError(f"{name} must have one of the dtypes {', '.join(map(str, allowed))}, got {x.dtype}")
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [N, d], got {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be [V, {hidden.shape[1]}] with V > 0, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}], got {list(targets.shape)}")
    vocabulary = weight.shape[0]
    require_values(
        ((targets >= 0) & (targets < vocabulary)).all(),
        lambda: f"targets must be in [0, {vocabulary}), got {targets.min().item()} to {targets.max().item()}",
    )
