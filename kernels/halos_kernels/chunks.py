"""The matrix products, one chunk of the vocabulary after another: what all implementations share.

Where no gradient of the weight is formed, rows are cut too, so that the workspace holds few rows of many columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from halos_kernels.inputs import Inputs, LogpOut


class Limits(NamedTuple):
    """Of what one pass holds beside its inputs and outputs. `parts` wins over `columns`, and that over `workspace`."""

    workspace: int  # bytes of one chunk of logits and of its copy in half precision, at most
    columns: int  # of a chunk, at least: a product with few is slow
    rows: int  # of one block of the forward pass, at most
    parts: int  # a chunk has at most 1 / parts of all logits of the call


# on the CPU a chunk stays in the cache
LIMITS = {"cpu": Limits(4 << 20, 128, 1024, 32), "cuda": Limits(192 << 20, 2048, 2048, 16)}
SMALLEST = 4096  # elements: a chunk is never cut below this
MOST = 2**30  # elements: kernels find their way in a chunk with 32 bits


def limits(device: torch.device) -> Limits:
    return LIMITS.get(device.type, LIMITS["cuda"])


class Chunk(NamedTuple):
    columns: slice
    weight: Tensor  # [n, d] rows of the weight, in the operand's dtype
    values: Tensor  # [N, n] products u, logits, or ∂loss/∂u


def width(inputs: Inputs, bytes_each: int | None = None) -> int:
    """Columns of a chunk. A function of shapes and dtypes alone: every pass over the same rows multiplies alike.

    Args:
        inputs: the call.
        bytes_each: held for one logit. Default: the logit, and its copy in half precision where that is the operand.
    """
    rows, vocabulary = max(1, inputs.hidden.shape[0]), inputs.weight.shape[0]
    limit = limits(inputs.hidden.device)
    if bytes_each is None:
        bytes_each = inputs.dtype.itemsize + (inputs.operand.itemsize if inputs.operand != inputs.dtype else 0)
    columns = max(limit.workspace // (bytes_each * rows), limit.columns)
    share = inputs.tokens * vocabulary // limit.parts
    columns = min(vocabulary, max(1, min(columns, max(SMALLEST, share) // rows, MOST // rows)))
    columns = math.ceil(vocabulary / math.ceil(vocabulary / columns))  # even chunks,
    return columns if columns < 256 else min(vocabulary, columns + -columns % 64)  # aligned ones where that is cheap


def products(inputs: Inputs) -> Iterator[Chunk]:
    """Chunks of hidden @ weight.T, never rounded below float32, in one buffer: each lives until the next."""
    hidden = inputs.hidden.to(inputs.operand)
    size = width(inputs)
    buffer = torch.empty(hidden.shape[0], size, dtype=inputs.dtype, device=hidden.device)
    for start in range(0, inputs.weight.shape[0], size):
        columns = slice(start, min(start + size, inputs.weight.shape[0]))
        weight = inputs.weight[columns].to(inputs.operand)
        u = buffer[:, : weight.shape[0]]
        if inputs.operand == inputs.dtype:
            torch.mm(hidden, weight.t(), out=u)
        else:
            torch.mm(hidden, weight.t(), out_dtype=inputs.dtype, out=u)
        yield Chunk(columns, weight, u)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in total's precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


class Exponentials(NamedTuple):
    """Of one chunk, for the expectation of the weight under the softmax."""

    weight: Tensor  # [n, d] rows of the weight, in the operand's dtype
    values: Tensor  # [N, n] exp(z − running maximum) · slope of the cap, in the operand's dtype
    rescale: Tensor  # [N] exp(maximum before this chunk − maximum after it)


class Softmax(Protocol):
    """A running softmax over chunks of products."""

    def add(self, chunk: Chunk) -> None:
        """Take in a chunk; its values are overwritten."""

    def weigh(self, chunk: Chunk) -> Exponentials:
        """Take in a chunk, and give its exponentials."""

    def finish(self) -> LogpOut: ...

    def at_target(self) -> tuple[Tensor, Tensor | None]:
        """Σ exp(z − maximum) [N], and the slope of the target's cap [N] or None without one."""


def forward(inputs: Inputs, start: Callable[[Inputs], Softmax]) -> LogpOut:
    """Outputs of one block of rows after another, each with a softmax of its own from `start`."""

    def score(block: Inputs) -> tuple[Tensor, ...]:
        softmax = start(block)
        for chunk in products(block):
            softmax.add(chunk)
        return tuple(x for x in softmax.finish() if x is not None)

    logp, lse, *entropy = by_rows(score, inputs)
    return LogpOut(logp, lse, entropy[0] if entropy else None)


def forward_frozen(inputs: Inputs, start: Callable[[Inputs], Softmax]) -> tuple[Tensor, ...]:
    """logp [N] and lse [N], bitwise those of `forward`, and ∂logp/∂hidden [N, d], from two products a chunk."""

    def score(block: Inputs) -> tuple[Tensor, ...]:
        softmax = start(block)
        weighted = weighted_sum(block, map(softmax.weigh, products(block)))
        out = softmax.finish()
        return out.logp, out.lse, dlogp_dhidden(block, weighted, *softmax.at_target())

    return by_rows(score, inputs)


def by_rows(
    score: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs, size: int | None = None
) -> tuple[Tensor, ...]:
    """`score` of one block of rows after another, as equal as can be, concatenated."""
    rows = max(1, inputs.hidden.shape[0])
    size = math.ceil(rows / math.ceil(rows / (size or limits(inputs.hidden.device).rows)))
    starts = range(0, rows, size)
    parts = [score(inputs.rows(slice(start, start + size))) for start in starts]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))


def weighted_sum(inputs: Inputs, chunks: Iterable[Exponentials]) -> Tensor:
    """Σ exponentials · weight [N, d] over all chunks, rescaled when the maximum rises as the softmax's sum is.

    Consuming the chunks is what fills their softmax: finish that afterwards.
    """
    total = torch.zeros(inputs.hidden.shape, dtype=inputs.dtype, device=inputs.hidden.device)
    for weight, exponentials, rescale in chunks:
        total.mul_(rescale[:, None])
        add_product(total, exponentials, weight)
    return total


def dlogp_dhidden(inputs: Inputs, weighted: Tensor, total: Tensor, cap: Tensor | None) -> Tensor:
    """∂logp/∂hidden [N, d] = slope · (cap · weight[target] − weighted / total), in hidden's dtype.

    Args:
        inputs: the call.
        weighted: [N, d] of `weighted_sum`; overwritten.
        total: [N] Σ exp(z − maximum).
        cap: [N] slope of the target's cap; None without one.
    """
    slope = inputs.transform.slope
    weighted.mul_((-slope / total)[:, None])
    own = inputs.weight[inputs.targets]
    if cap is not None:  # rounded as in the sum, so that the two cancel where p → 1
        own = own.to(weighted.dtype).mul_(cap.to(inputs.operand)[:, None])
    return weighted.add_(own, alpha=slope).to(inputs.hidden.dtype)


def gradients(
    inputs: Inputs, dlogits: Iterable[Chunk], needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias from chunks of ∂loss/∂u [N, n].

    The vocabulary is the outer loop: a row of the weight gets its whole gradient from one product. That of hidden is
    summed in float32.
    """
    hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
    operand = hidden.to(inputs.operand)
    grad_hidden = torch.zeros(hidden.shape, dtype=inputs.dtype, device=hidden.device) if needed[0] else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needed[1] else None
    grad_bias = torch.empty_like(bias) if bias is not None and needed[2] else None
    for columns, rows, du in dlogits:
        if grad_bias is not None:
            grad_bias[columns] = du.sum(0, dtype=inputs.dtype)
        if grad_hidden is not None:
            add_product(grad_hidden, du, rows)
        if grad_weight is not None and operand.dtype == grad_weight.dtype:
            torch.mm(du.t(), operand, out=grad_weight[columns])
        elif grad_weight is not None:
            grad_weight[columns] = torch.mm(du.t(), operand)
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias
