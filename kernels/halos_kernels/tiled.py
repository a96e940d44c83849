"""Strategy "tiled" on the host: launches of the kernels in `jit.tiled`, which keep logits in registers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from halos_kernels.chunks import Chunk, Exponentials, by_rows, dlogp_dhidden, weighted_sum, width
from halos_kernels.dispatch import DESCRIPTORS, architecture, tile
from halos_kernels.inputs import HALF, Inputs, LogpOut, Upstream
from halos_kernels.jit.math import INTERPRET
from halos_kernels.jit.tiled import dlogits_kernel, rescale_kernel, statistics_kernel
from halos_kernels.partials import Partials, at_target, binary, merge

FROZEN_ROWS = 4096  # of one block of the frozen forward: many, since its programs run through few columns
PROGRAMS = 264  # that one of its launches should have: two for each processor of an H100 or H200


def serves(inputs: Inputs) -> bool:
    """Both factors in one half precision (the interpreter takes float32 too), rows contiguous."""
    hidden, weight = inputs.hidden, inputs.weight
    known = hidden.dtype == weight.dtype and (hidden.dtype in HALF or INTERPRET)
    return known and hidden.stride(1) == 1 and weight.stride(1) == 1


def forward(inputs: Inputs, *, entropy: bool) -> LogpOut:
    """As `halos_kernels.eager.forward`."""
    block = _forward_tile(inputs)
    splits = _splits(inputs, block)
    partials = Partials.start(splits, inputs, entropy=entropy)
    _statistics([inputs], partials, block, range(splits), entropy=entropy)
    return merge(partials)


def forward_pair(first: Inputs, second: Inputs, *, entropy: bool) -> list[LogpOut]:
    """Two alike heads on the same targets in one launch; values bitwise those of two calls."""
    block = _forward_tile(first)
    splits = _splits(first, block)
    partials = Partials.start(splits, first, entropy=entropy, heads=(2,))
    _statistics([first, second], partials, block, range(splits), entropy=entropy)
    return [merge(partials.head(i)) for i in range(2)]


def forward_frozen(inputs: Inputs) -> tuple[Tensor, ...]:
    """As `halos_kernels.eager.forward_frozen`."""

    def score(rows: Inputs) -> tuple[Tensor, ...]:
        block = _forward_tile(rows)
        partials = Partials.start(_splits(rows, block), rows, entropy=False)
        weighted = weighted_sum(rows, _exponentials(rows, partials, block))
        logp, lse, _ = merge(partials)
        return logp, lse, dlogp_dhidden(rows, weighted, *at_target(partials, rows.transform))

    return by_rows(score, inputs, size=FROZEN_ROWS)


def dlogits(inputs: Inputs, upstream: Upstream) -> Iterator[Chunk]:
    """As `halos_kernels.eager.dlogits`."""
    plain = inputs.transform.softcap is None and upstream.entropy is None
    block = _tile("dlogits" if plain else "dlogits_full", inputs)
    rows, (vocabulary, d) = inputs.hidden.shape[0], inputs.weight.shape
    tiles = triton.cdiv(width(inputs, inputs.operand.itemsize), block["BLOCK_N"])
    size = min(vocabulary, tiles * block["BLOCK_N"])
    buffer = inputs.hidden.new_empty(rows, size, dtype=inputs.operand)
    [(h, w)], descriptors = _operands([inputs], block)
    for start in range(0, vocabulary, size):
        columns = slice(start, min(start + size, vocabulary))
        du = buffer[:, : columns.stop - start]
        programs = triton.cdiv(rows, block["BLOCK_M"]) * triton.cdiv(du.shape[1], block["BLOCK_N"])
        dlogits_kernel[(programs,)](
            h,
            w,
            inputs.targets if inputs.bias is None else inputs.bias,
            inputs.targets,
            upstream.lse,
            upstream.entropies,
            upstream.logp,
            upstream.logp if upstream.entropy is None else upstream.entropy,
            du,
            rows,
            vocabulary,
            start,
            du.shape[1],
            inputs.hidden.stride(0),
            inputs.weight.stride(0),
            du.stride(0),
            *binary(inputs.transform),
            inputs.transform.slope,
            D=d,
            HAS_BIAS=inputs.bias is not None,
            SOFTCAP=inputs.transform.softcap is not None,
            ENTROPY=upstream.entropy is not None,
            DESCRIPTORS=descriptors,
            INTERPRETED=INTERPRET,
            **block,
        )
        yield Chunk(columns, inputs.weight[columns].to(inputs.operand), du)


def _exponentials(inputs: Inputs, partials: Partials, block: dict[str, int]) -> Iterator[Exponentials]:
    """Chunks of whole splits: their statistics, and their exponentials."""
    rows, vocabulary = inputs.hidden.shape[0], inputs.weight.shape[0]
    columns_each, all_splits = block["TILES"] * block["BLOCK_N"], partials.peak.shape[0]
    wanted = triton.cdiv(PROGRAMS, triton.cdiv(rows, block["BLOCK_M"]))
    each = max(1, min(wanted, all_splits // 8))
    e = inputs.hidden.new_empty(rows, each * columns_each, dtype=inputs.operand)
    tile_peak = partials.target.new_empty(each * block["TILES"], rows)
    peak = partials.target.new_full((rows,), torch.finfo(torch.float32).min)
    own = _tile("rescale", inputs)
    for split in range(0, all_splits, each):
        splits = range(split, min(split + each, all_splits))
        _statistics([inputs], partials, block, splits, entropy=False, store=(e, tile_peak))
        columns = slice(split * columns_each, min(splits.stop * columns_each, vocabulary))
        after = torch.maximum(peak, partials.peak[split : splits.stop].amax(0))
        part = e[:, : columns.stop - columns.start]
        grid = (triton.cdiv(rows, own["BLOCK_M"]), triton.cdiv(part.shape[1], block["BLOCK_N"]))
        rescale_kernel[grid](part, tile_peak, after, rows, part.shape[1], e.stride(0), BLOCK_N=block["BLOCK_N"], **own)
        yield Exponentials(inputs.weight[columns].to(inputs.operand), part, torch.exp2(peak - after))
        peak = after


def _statistics(
    heads: list[Inputs],
    partials: Partials,
    block: dict[str, int],
    splits: range,
    *,
    entropy: bool,
    store: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill the partials of these splits; `store` takes the exponentials [N, n] and each tile's peak [tiles, N]."""
    first, last = heads[0], heads[-1]
    (rows, d), vocabulary = first.hidden.shape, first.weight.shape[0]
    operands, descriptors = _operands(heads, block)
    (h0, w0), (h1, w1) = operands[0], operands[-1]
    e, tile_peak = store or (partials.peak, partials.peak)
    statistics_kernel[(triton.cdiv(rows, block["BLOCK_M"]) * len(splits), len(heads))](
        h0,
        w0,
        first.targets if first.bias is None else first.bias,
        h1,
        w1,
        last.targets if last.bias is None else last.bias,
        first.targets,
        *partials,
        e,
        tile_peak,
        rows,
        vocabulary,
        splits.start,
        len(splits),
        partials.peak.shape[-2],
        first.hidden.stride(0),
        first.weight.stride(0),
        0 if store is None else e.stride(0),
        *binary(first.transform),
        D=d,
        HEADS=len(heads),
        HAS_BIAS=first.bias is not None,
        SOFTCAP=first.transform.softcap is not None,
        ENTROPY=entropy,
        STORE=store is not None,
        DESCRIPTORS=descriptors,
        INTERPRETED=INTERPRET,
        **block,
    )


def _forward_tile(inputs: Inputs) -> dict[str, int]:
    """One for every pass over the same head, so that their log-probabilities are bitwise equal."""
    return _tile("forward" if inputs.transform.softcap is None else "forward_capped", inputs)


def _tile(kernel: str, inputs: Inputs) -> dict[str, int]:
    return tile(kernel, architecture(inputs.hidden.device))


def _splits(inputs: Inputs, block: dict[str, int]) -> int:
    return int(triton.cdiv(triton.cdiv(inputs.weight.shape[0], block["BLOCK_N"]), block["TILES"]))


def _operands(heads: list[Inputs], block: dict[str, int]) -> tuple[list[tuple[Any, Any]], bool]:
    """Hidden and weight of each head: as tensor descriptors, where the device copies by them and all rows are aligned
    to 16 bytes; and whether they are."""
    matrices = [x for head in heads for x in (head.hidden, head.weight)]
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(0) > 0 for x in matrices
    )
    if not aligned or architecture(matrices[0].device) not in DESCRIPTORS:
        return [(head.hidden, head.weight) for head in heads], False

    def copied(x: Tensor, rows: str) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x, [block[rows], block["BLOCK_D"]])

    return [(copied(head.hidden, "BLOCK_M"), copied(head.weight, "BLOCK_N")) for head in heads], True
