"""Strategy "chunked": the vendor's matrix product writes a chunk of float32 logits, one kernel folds it away."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from halos_kernels.chunks import Chunk, Weighted, by_rows, products, pull, weighted_sum, width
from halos_kernels.dispatch import architecture, tile
from halos_kernels.inputs import Inputs, LogpOut
from halos_kernels.jit.chunked import dlogits_kernel, fold_kernel
from halos_kernels.jit.math import INTERPRET
from halos_kernels.partials import Partials, binary, cap_slope, merge, total


class _Softmax:
    """The running softmax of a block of rows."""

    def __init__(self, inputs: Inputs, *, entropy: bool) -> None:
        self.inputs, self.entropy = inputs, entropy
        self.partials = Partials.start(1, inputs, entropy=entropy)
        self.tile = tile("fold", architecture(inputs.hidden.device))

    def add(self, chunk: Chunk, into: Tensor | None = None) -> Tensor:
        """Fold a chunk; where `into` [N, n] is given, fill it with the exponentials and return by how much earlier ones
        fall [N]."""
        inputs, (columns, _, u) = self.inputs, chunk
        rows, n = u.shape
        fall = torch.empty_like(self.partials.target) if into is not None else self.partials.target
        store = u if into is None else into
        inner, outer = binary(inputs.transform)
        fold_kernel[(triton.cdiv(rows, self.tile["BLOCK_M"]),)](
            u,
            u if inputs.bias is None else inputs.bias,
            inputs.targets,
            *self.partials,
            store,
            fall,
            rows,
            columns.start,
            n,
            u.stride(0),
            store.stride(0),
            inner,
            outer,
            HAS_BIAS=inputs.bias is not None,
            SOFTCAP=inputs.transform.softcap is not None,
            ENTROPY=self.entropy,
            STORE=into is not None,
            INTERPRETED=INTERPRET,
            **self.tile,
        )
        return fall


def forward(inputs: Inputs, *, entropy: bool) -> LogpOut:
    def score(block: Inputs) -> tuple[Tensor, ...]:
        softmax = _Softmax(block, entropy=entropy)
        for chunk in products(block):
            softmax.add(chunk)
        return tuple(x for x in merge(softmax.partials) if x is not None)

    logp, lse, *rest = by_rows(score, inputs)
    return LogpOut(logp, lse, rest[0] if rest else None)


def forward_frozen(inputs: Inputs) -> tuple[Tensor, ...]:
    def score(block: Inputs) -> tuple[Tensor, ...]:
        softmax = _Softmax(block, entropy=False)
        buffer = block.hidden.new_empty(block.hidden.shape[0], width(block), dtype=block.operand)

        def chunks() -> Iterator[Weighted]:
            for chunk in products(block):
                e = buffer[:, : chunk.values.shape[1]]
                yield Weighted(chunk.weight, e, softmax.add(chunk, into=e))

        weighted = weighted_sum(block, chunks())
        logp, lse, _ = merge(softmax.partials)
        cap = cap_slope(softmax.partials, block.transform)
        return logp, lse, pull(block, weighted, total(softmax.partials), cap)

    return by_rows(score, inputs)


def dlogits(
    inputs: Inputs, lse: Tensor, entropy: Tensor | None, grad_logp: Tensor | None, grad_entropy: Tensor | None
) -> Iterator[Chunk]:
    block = tile("chunk_dlogits", architecture(inputs.hidden.device))
    separate = inputs.operand != inputs.dtype
    rows = inputs.hidden.shape[0]
    buffer = torch.empty(rows, width(inputs) if separate else 0, dtype=inputs.operand, device=lse.device)
    g = torch.zeros_like(lse) if grad_logp is None else grad_logp
    inner, outer = binary(inputs.transform)
    for columns, weight, u in products(inputs):
        n = u.shape[1]
        du = buffer[:, :n] if separate else u
        dlogits_kernel[(triton.cdiv(rows, block["BLOCK_M"]), triton.cdiv(n, block["BLOCK_N"]))](
            u,
            u if inputs.bias is None else inputs.bias,
            inputs.targets,
            lse,
            lse if entropy is None else entropy,
            g,
            g if grad_entropy is None else grad_entropy,
            du,
            rows,
            columns.start,
            n,
            u.stride(0),
            du.stride(0),
            inner,
            outer,
            inputs.transform.slope,
            HAS_BIAS=inputs.bias is not None,
            SOFTCAP=inputs.transform.softcap is not None,
            ENTROPY=grad_entropy is not None,
            **block,
        )
        yield Chunk(columns, weight, du)
