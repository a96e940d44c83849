"""`linear_logp` in PyTorch operators: the twin that defines the others, and the default on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from halos_kernels import chunks
from halos_kernels.chunks import Chunk, Exponentials, products
from halos_kernels.inputs import Inputs, LogpOut, Transform, Upstream

_FLOOR = -1e4  # exp(_FLOOR) is 0 in every dtype here, and unlike -inf it survives a product with that 0


def forward(inputs: Inputs, *, entropy: bool) -> LogpOut:
    """Log-probabilities, log-sum-exps and, if asked for, entropies."""
    return chunks.forward(inputs, partial(_Softmax, entropy=entropy))


def forward_frozen(inputs: Inputs) -> tuple[Tensor, ...]:
    """logp [N] and lse [N], bitwise those of `forward`, and ∂logp/∂hidden [N, d]."""
    return chunks.forward_frozen(inputs, _Softmax)


def dlogits(inputs: Inputs, upstream: Upstream) -> Iterator[Chunk]:
    """Chunks of ∂loss/∂u [N, n], from recomputed logits."""
    slope = inputs.transform.slope
    g = upstream.logp * slope
    for chunk in products(inputs):
        z = _logits_(chunk, inputs)
        cap = _cap_slope(z, inputs.transform)
        z.sub_(upstream.lse[:, None])
        if upstream.entropy is not None:  # ∂entropy/∂z = −p·(log p + entropy)
            force = z.clamp_(min=_FLOOR).add(upstream.entropies[:, None])
            force.mul_((upstream.entropy * slope)[:, None]).add_(g[:, None])
            z.exp_().mul_(force).neg_()
        else:
            z.exp_().mul_(-g[:, None])
        column, inside = _locate(inputs.targets, chunk.columns)
        z.scatter_add_(1, column[:, None], torch.where(inside, g, 0.0)[:, None])
        if cap is not None:
            z.mul_(cap)
        yield chunk._replace(values=z.to(inputs.operand))


class _Softmax:
    """Log-sum-exp over chunks of logits, relative to a running maximum."""

    def __init__(self, inputs: Inputs, *, entropy: bool = False) -> None:
        self.inputs = inputs
        shape, dtype = inputs.targets.shape, inputs.dtype
        self.peak = inputs.hidden.new_full(shape, torch.finfo(dtype).min, dtype=dtype)  # running maximum, finite
        self.total = torch.zeros_like(self.peak)  # Σ exp(z − peak)
        self.moment = torch.zeros_like(self.peak) if entropy else None  # Σ exp(z − peak)·(z − peak)
        self.target = torch.full_like(self.peak, math.nan)  # the target's logit

    def add(self, chunk: Chunk) -> None:
        self._fold(_logits_(chunk, self.inputs), chunk.columns)

    def weigh(self, chunk: Chunk) -> Exponentials:
        z = _logits_(chunk, self.inputs)
        cap = _cap_slope(z, self.inputs.transform)
        exponentials, rescale = self._fold(z, chunk.columns)
        if cap is not None:
            exponentials.mul_(cap)
        return Exponentials(chunk.weight, exponentials.to(self.inputs.operand), rescale)

    def _fold(self, z: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """exp(z − peak) [N, n], in place unless the moment is kept, and exp(peak before − peak after) [N]."""
        column, inside = _locate(self.inputs.targets, columns)
        self.target = torch.where(inside, z.gather(1, column[:, None])[:, 0], self.target)
        higher = torch.maximum(self.peak, z.amax(1))
        drop = self.peak - higher
        rescale = drop.exp()
        z.sub_(higher[:, None])
        if self.moment is None:
            exponentials = z.exp_()
        else:
            exponentials = z.clamp_(min=_FLOOR).exp()
            self.moment = rescale * (self.moment + drop * self.total) + z.mul_(exponentials).sum(1)
        self.total = self.total * rescale + exponentials.sum(1)
        self.peak = higher
        return exponentials, rescale

    def finish(self) -> LogpOut:
        log_total = self.total.log()
        logp = (self.target - self.peak) - log_total  # not z − lse, whose rounding grows with the logits' magnitude
        entropy = None if self.moment is None else log_total - self.moment / self.total
        return LogpOut(logp, self.peak + log_total, entropy)

    def at_target(self) -> tuple[Tensor, Tensor | None]:
        return self.total, _cap_slope(self.target, self.inputs.transform)


def _logits_(chunk: Chunk, inputs: Inputs) -> Tensor:
    """z [N, n] from products, in place."""
    z, transform = chunk.values, inputs.transform
    if inputs.bias is not None:
        z.add_(inputs.bias[chunk.columns])
    if transform.inner != 1.0:
        z.mul_(transform.inner)
    return z if transform.softcap is None else z.tanh_().mul_(transform.outer)


def _cap_slope(z: Tensor, transform: Transform) -> Tensor | None:
    """1 − tanh² from finished logits; None without a cap."""
    return None if transform.softcap is None else (z / transform.outer).square_().neg_().add_(1.0)


def _locate(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each target's column within the chunk (clamped into it), and whether the chunk holds it."""
    local = targets - columns.start
    column = local.clamp(0, columns.stop - columns.start - 1)
    return column, column == local
