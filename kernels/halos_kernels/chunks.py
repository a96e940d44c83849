"""The matrix products, one chunk of the vocabulary after another: what eager and Triton implementations share.

Rows are cut too where no weight gradient is formed, so that the workspace holds few rows of many columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from halos_kernels.inputs import Inputs


class Limits(NamedTuple):
    """Of what one pass holds beside its inputs and outputs."""

    workspace: int  # bytes of one chunk of logits and of its copy in half precision,
    columns: int  # but at least so many columns: a product with few is slow
    rows: int  # of one block of the forward pass
    parts: int  # a chunk is at most this part of all logits,


# on the CPU a chunk stays in the cache
LIMITS = {"cpu": Limits(4 << 20, 128, 1024, 32), "cuda": Limits(256 << 20, 2048, 2048, 16)}
SMALLEST = 4096  # elements: but never cut below this
MOST = 2**30  # elements: kernels find their way in a chunk with 32 bits


def limits(device: torch.device) -> Limits:
    return LIMITS.get(device.type, LIMITS["cuda"])


class Chunk(NamedTuple):
    columns: slice
    weight: Tensor  # [n, d] rows of the weight, in the operand's dtype
    values: Tensor  # [N, n] logits, or what an implementation made of them


def width(inputs: Inputs) -> int:
    """Columns of a chunk. A function of shapes and dtypes alone: every pass over the same rows multiplies alike."""
    rows, vocabulary = max(1, inputs.hidden.shape[0]), inputs.weight.shape[0]
    limit = limits(inputs.hidden.device)
    bytes_each = inputs.dtype.itemsize + (inputs.operand.itemsize if inputs.operand != inputs.dtype else 0)
    columns = max(limit.workspace // (bytes_each * rows), limit.columns)
    columns = min(columns, max(SMALLEST // rows, vocabulary // limit.parts), MOST // rows)
    if columns >= vocabulary:
        return vocabulary
    columns = math.ceil(vocabulary / math.ceil(vocabulary / max(1, columns)))  # even chunks,
    return columns if columns < 256 else columns - columns % 64  # aligned ones where that is cheap


def products(inputs: Inputs) -> Iterator[Chunk]:
    """Chunks of hidden @ weight.T, never rounded below float32. Their buffer is reused: a chunk lives until the next.

    Products into `out=` are exempt from autocast.
    """
    hidden = inputs.hidden.to(inputs.operand)
    size = width(inputs)
    buffer = torch.empty(hidden.shape[0], size, dtype=inputs.dtype, device=hidden.device)
    for start in range(0, inputs.weight.shape[0], size):
        columns = slice(start, min(start + size, inputs.weight.shape[0]))
        weight = inputs.weight[columns].to(inputs.operand)
        z = buffer[:, : weight.shape[0]]
        if inputs.operand == inputs.dtype:
            torch.mm(hidden, weight.t(), out=z)
        else:
            torch.mm(hidden, weight.t(), out_dtype=inputs.dtype, out=z)
        yield Chunk(columns, weight, z)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in total's precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def by_rows(
    score: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs, size: int | None = None
) -> tuple[Tensor, ...]:
    """`score` of one block of rows after another, concatenated."""
    size = size or limits(inputs.hidden.device).rows
    starts = range(0, max(1, inputs.hidden.shape[0]), size)
    parts = [score(inputs.rows(slice(start, start + size))) for start in starts]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))


def gradients(
    inputs: Inputs, dlogits: Iterable[Chunk], needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias from chunks of ∂loss/∂u [N, n], u the product before scale and cap.

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


class Weighted(NamedTuple):
    """A chunk of exp(z − peak), each column times the slope of its cap, and by how much earlier chunks fall."""

    weight: Tensor  # [n, d]
    exponentials: Tensor  # [N, n], relative to the running maximum after this chunk
    fall: Tensor  # [N] exp(peak before − peak after)


def weighted_sum(inputs: Inputs, chunks: Iterable[Weighted]) -> Tensor:
    """Σ exp(z − peak) · slope of the cap · weight [N, d], rescaled when the maximum rises as the softmax's sum is."""
    total = torch.zeros(inputs.hidden.shape, dtype=inputs.dtype, device=inputs.hidden.device)
    for weight, exponentials, fall in chunks:
        total.mul_(fall[:, None])
        add_product(total, exponentials, weight)
    return total


def pull(inputs: Inputs, weighted: Tensor, total: Tensor, cap: Tensor | None) -> Tensor:
    """∂logp/∂hidden [N, d] = slope · (cap · weight[target] − weighted / total), in hidden's dtype.

    Args:
        inputs: the call.
        weighted: [N, d] of `weighted_sum`; overwritten.
        total: [N] Σ exp(z − peak).
        cap: [N] slope of the target's cap; None without one.
    """
    slope = inputs.transform.slope
    weighted.mul_((-slope / total)[:, None])
    own = inputs.weight[inputs.targets]
    if cap is not None:
        own = own.to(weighted.dtype).mul_(cap[:, None])
    return weighted.add_(own, alpha=slope).to(inputs.hidden.dtype)
