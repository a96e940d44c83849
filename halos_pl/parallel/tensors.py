"""Tensors of which every rank holds some rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local_rows(tensor: DTensor) -> tuple[int, int]:
    """First row and number of rows of the shard that this rank holds: torch.chunk's, of the first dimension.

    Raises:
        ValueError: sharded along another dimension.
    """
    size, mesh = tensor.shape[0] if tensor.dim() else 1, tensor.device_mesh
    start, rows = 0, size
    for d, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            if placement.dim != 0:
                raise ValueError(f"a tensor is sharded along dimension {placement.dim}, expected 0")
            chunk = -(-size // mesh.size(d))
            start = min(size, chunk * mesh.get_local_rank(d))
            rows = min(chunk, size - start)
    return start, rows


def like(local: Tensor, pattern: DTensor) -> DTensor:
    """A tensor that is sharded as another one of the same shape, of the rows that this rank holds."""
    return DTensor.from_local(
        local, pattern.device_mesh, pattern.placements, run_check=False, shape=pattern.shape, stride=pattern.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank: a collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
    """Whole tensors in the host's memory, one after the other: on the first rank; the others take part and get None."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    for name, tensor in state.items():
        value = whole(tensor.detach())
        yield name, value.cpu() if first else None
