"""`linear_logp` in PyTorch operators: the twin that defines the others, and the default on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from halos_kernels.chunks import Chunk, Weighted, by_rows, products, pull, weighted_sum
from halos_kernels.inputs import Inputs, LogpOut, Transform

_FLOOR = -1e4  # exp(_FLOOR) is 0 in every dtype here, and unlike -inf it survives a product with that 0


def forward(inputs: Inputs, *, entropy: bool) -> LogpOut:
    """Log-probabilities, log-sum-exps and, if asked for, entropies."""

    def score(block: Inputs) -> tuple[Tensor, ...]:
        softmax = _OnlineSoftmax(block, entropy=entropy)
        for chunk in _logits(block):
            softmax.add(chunk)
        return softmax.finish()

    logp, lse, *rest = by_rows(score, inputs)
    return LogpOut(logp, lse, rest[0] if rest else None)


def forward_frozen(inputs: Inputs) -> tuple[Tensor, ...]:
    """logp [N] and lse [N], bitwise those of `forward`, and ∂logp/∂hidden [N, d]."""

    def score(block: Inputs) -> tuple[Tensor, ...]:
        softmax = _OnlineSoftmax(block, entropy=False)

        def chunks() -> Iterator[Weighted]:
            for chunk in _logits(block):
                cap = _cap_slope(chunk.values, block.transform)
                exponentials, fall = softmax.add(chunk)
                yield Weighted(chunk.weight, exponentials if cap is None else exponentials.mul_(cap), fall)

        weighted = weighted_sum(block, chunks())
        cap = _cap_slope(softmax.target, block.transform)
        return *softmax.finish(), pull(block, weighted, softmax.total, cap)

    return by_rows(score, inputs)


def dlogits(
    inputs: Inputs, lse: Tensor, entropy: Tensor | None, grad_logp: Tensor | None, grad_entropy: Tensor | None
) -> Iterator[Chunk]:
    """Chunks of ∂loss/∂u [N, n], u = hidden @ weight.T + bias, from recomputed logits."""
    slope = inputs.transform.slope
    g = torch.zeros_like(lse) if grad_logp is None else grad_logp * slope
    for columns, weight, z in _logits(inputs):
        cap = _cap_slope(z, inputs.transform)
        z.sub_(lse[:, None])
        if grad_entropy is not None and entropy is not None:  # ∂entropy/∂z = −p·(log p + entropy)
            force = z.clamp_(min=_FLOOR).add(entropy[:, None]).mul_(grad_entropy[:, None] * slope).add_(g[:, None])
            z.exp_().mul_(force).neg_()
        else:
            z.exp_().mul_(-g[:, None])
        column, inside = _locate(inputs.targets, columns)
        z.scatter_add_(1, column[:, None], torch.where(inside, g, 0.0)[:, None])
        if cap is not None:
            z.mul_(cap)
        yield Chunk(columns, weight, z.to(inputs.operand))


class _OnlineSoftmax:
    """Log-sum-exp over chunks of logits, relative to a running maximum."""

    def __init__(self, inputs: Inputs, *, entropy: bool) -> None:
        self.targets = inputs.targets
        shape, dtype = inputs.targets.shape, inputs.dtype
        self.peak = inputs.hidden.new_full(shape, torch.finfo(dtype).min, dtype=dtype)  # running maximum, finite
        self.total = torch.zeros_like(self.peak)  # Σ exp(z − peak)
        self.moment = torch.zeros_like(self.peak) if entropy else None  # Σ exp(z − peak)·(z − peak)
        self.target = torch.full_like(self.peak, math.nan)  # the target's logit

    def add(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """exp(z − peak) [N, n], in place unless the moment is kept, and exp(peak before − peak after) [N]."""
        z = chunk.values
        column, inside = _locate(self.targets, chunk.columns)
        self.target = torch.where(inside, z.gather(1, column[:, None])[:, 0], self.target)
        higher = torch.maximum(self.peak, z.amax(1))
        drop = self.peak - higher
        fall = drop.exp()
        z.sub_(higher[:, None])
        if self.moment is None:
            exponentials = z.exp_()
        else:
            exponentials = z.clamp_(min=_FLOOR).exp()
            self.moment = fall * (self.moment + drop * self.total) + z.mul_(exponentials).sum(1)
        self.total = self.total * fall + exponentials.sum(1)
        self.peak = higher
        return exponentials, fall

    def finish(self) -> tuple[Tensor, ...]:
        log_total = self.total.log()
        logp = (self.target - self.peak) - log_total  # not z − lse, whose rounding grows with the logits' magnitude
        out = (logp, self.peak + log_total)
        return out if self.moment is None else (*out, log_total - self.moment / self.total)


def _logits(inputs: Inputs) -> Iterator[Chunk]:
    """Chunks of z [N, n], in the buffer of `products`."""
    transform = inputs.transform
    for chunk in products(inputs):
        z = chunk.values
        if inputs.bias is not None:
            z.add_(inputs.bias[chunk.columns])
        if transform.inner != 1.0:
            z.mul_(transform.inner)
        if transform.softcap is not None:
            z.tanh_().mul_(transform.outer)
        yield chunk


def _cap_slope(z: Tensor, transform: Transform) -> Tensor | None:
    """1 − tanh² from finished logits; None without a cap."""
    return None if transform.softcap is None else (z / transform.outer).square_().neg_().add_(1.0)


def _locate(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each target's column within the chunk (clamped into it), and whether the chunk holds it."""
    local = targets - columns.start
    column = local.clamp(0, columns.stop - columns.start - 1)
    return column, column == local
