"""Strategy "chunked": the vendor's matrix product writes a chunk of float32 products, one kernel folds it away."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
from torch import Tensor

from halos_kernels import chunks
from halos_kernels.chunks import Chunk, Exponentials, products, width
from halos_kernels.dispatch import architecture, tile
from halos_kernels.inputs import Inputs, LogpOut, Upstream
from halos_kernels.jit.chunked import dlogits_kernel, fold_kernel
from halos_kernels.jit.math import INTERPRET
from halos_kernels.partials import Partials, at_target, binary, merge


def forward(inputs: Inputs, *, entropy: bool) -> LogpOut:
    """As `halos_kernels.eager.forward`."""
    return chunks.forward(inputs, partial(_Softmax, entropy=entropy))


def forward_frozen(inputs: Inputs) -> tuple[Tensor, ...]:
    """As `halos_kernels.eager.forward_frozen`."""
    return chunks.forward_frozen(inputs, _Softmax)


def dlogits(inputs: Inputs, upstream: Upstream) -> Iterator[Chunk]:
    """As `halos_kernels.eager.dlogits`."""
    block = tile("chunk_dlogits", architecture(inputs.hidden.device))
    separate = inputs.operand != inputs.dtype
    rows = inputs.hidden.shape[0]
    buffer = inputs.hidden.new_empty(rows, width(inputs) if separate else 0, dtype=inputs.operand)
    for chunk in products(inputs):
        u = chunk.values
        n = u.shape[1]
        du = buffer[:, :n] if separate else u
        dlogits_kernel[(triton.cdiv(rows, block["BLOCK_M"]), triton.cdiv(n, block["BLOCK_N"]))](
            u,
            u if inputs.bias is None else inputs.bias,
            inputs.targets,
            upstream.lse,
            upstream.entropies,
            upstream.logp,
            upstream.logp if upstream.entropy is None else upstream.entropy,
            du,
            rows,
            chunk.columns.start,
            n,
            u.stride(0),
            du.stride(0),
            *binary(inputs.transform),
            inputs.transform.slope,
            HAS_BIAS=inputs.bias is not None,
            SOFTCAP=inputs.transform.softcap is not None,
            ENTROPY=upstream.entropy is not None,
            **block,
        )
        yield chunk._replace(values=du)


class _Softmax:
    """The running softmax of a block of rows: one partial, into which a kernel folds chunk after chunk."""

    def __init__(self, inputs: Inputs, *, entropy: bool = False) -> None:
        self.inputs, self.entropy = inputs, entropy
        self.partials = Partials.start(1, inputs, entropy=entropy)
        self.tile = tile("fold", architecture(inputs.hidden.device))
        self.buffer: Tensor | None = None  # of exponentials

    def add(self, chunk: Chunk) -> None:
        self._fold(chunk, None, None)

    def weigh(self, chunk: Chunk) -> Exponentials:
        inputs = self.inputs
        if self.buffer is None:
            self.buffer = inputs.hidden.new_empty(inputs.hidden.shape[0], width(inputs), dtype=inputs.operand)
        exponentials = self.buffer[:, : chunk.values.shape[1]]
        rescale = torch.empty_like(self.partials.target)
        self._fold(chunk, exponentials, rescale)
        return Exponentials(chunk.weight, exponentials, rescale)

    def _fold(self, chunk: Chunk, exponentials: Tensor | None, rescale: Tensor | None) -> None:
        inputs, u = self.inputs, chunk.values
        rows, n = u.shape
        fold_kernel[(triton.cdiv(rows, self.tile["BLOCK_M"]),)](
            u,
            u if inputs.bias is None else inputs.bias,
            inputs.targets,
            *self.partials,
            u if exponentials is None else exponentials,
            u if rescale is None else rescale,
            rows,
            chunk.columns.start,
            n,
            u.stride(0),
            0 if exponentials is None else exponentials.stride(0),
            *binary(inputs.transform),
            HAS_BIAS=inputs.bias is not None,
            SOFTCAP=inputs.transform.softcap is not None,
            ENTROPY=self.entropy,
            STORE=exponentials is not None,
            INTERPRETED=INTERPRET,
            **self.tile,
        )

    def finish(self) -> LogpOut:
        return merge(self.partials)

    def at_target(self) -> tuple[Tensor, Tensor | None]:
        return at_target(self.partials, self.inputs.transform)
