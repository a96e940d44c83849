"""Named tensors in safetensors files, a file a rank, of which any number of ranks reads the rows that it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from halos_pl.checkpoints.errors import CheckpointError
from halos_pl.parallel import gathered, local_rows

KEY = "halos_pl.pieces"


class Piece(NamedTuple):
    """Rows [start, start + rows) of a tensor, in a file."""

    file: str
    start: int
    rows: int


def write_tensors(state: Mapping[str, Tensor], folder: Path, *, full: bool) -> Path | None:
    """Write this rank's share of some tensors; a collective where they are sharded and `full` is asked for.

    Args:
        state: the same names on every rank. What is not sharded is the first rank's to write.
        folder: that takes the file.
        full: the first rank gathers and writes all.

    Returns:
        The file; None where this rank has nothing to write.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pieces: dict[str, tuple[int, list[int]]] = {}
    mine: dict[str, Tensor] = {}
    if full:
        mine = {name: value.contiguous() for name, value in gathered(state) if value is not None}
        world = 1
    else:
        for name, tensor in state.items():
            start, rows = _share(tensor, rank)
            if rows or (rank == 0 and not tensor.numel()):
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                mine[name] = local.detach().cpu().contiguous()
                pieces[name] = start, list(tensor.shape)
    if not mine and rank:
        return None
    path = folder / f"tensors-{rank:05}-of-{world:05}.safetensors"
    save_file(mine, path, metadata={KEY: json.dumps(pieces)})
    return path


def _share(tensor: Tensor, rank: int) -> tuple[int, int]:
    """First row and rows that this rank is to write: those that it holds, unless another holds them too."""
    if not isinstance(tensor, DTensor):
        return 0, 0 if rank else max(1, tensor.shape[0] if tensor.dim() else 1)
    mesh = tensor.device_mesh
    copies = [mesh.get_local_rank(d) for d, where in enumerate(tensor.placements) if not isinstance(where, Shard)]
    start, rows = local_rows(tensor)
    return start, 0 if any(copies) else rows


class TensorFiles:
    """The tensors of a folder, whichever files hold their rows.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.shapes: dict[str, list[int]] = {}
        self.pieces: dict[str, list[Piece]] = {}
        self._paths = {path.name: path for path in paths}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    placed = json.loads((file.metadata() or {}).get(KEY, "{}"))
                    for name in file.keys():  # noqa: SIM118  no mapping
                        shape = list(file.get_slice(name).get_shape())
                        start, whole = placed.get(name, (0, shape))
                        self.shapes[name] = whole
                        self.pieces.setdefault(name, []).append(Piece(path.name, start, shape[0] if shape else 1))
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error

    def rows(self, name: str, start: int = 0, rows: int | None = None) -> Tensor:
        """Some rows of a tensor, on the CPU. A tensor without dimensions has one row.

        Raises:
            CheckpointError: no such tensor, or some of the rows are in no file.
        """
        if name not in self.shapes:
            raise CheckpointError(f"the checkpoint holds no {name!r}")
        shape = self.shapes[name]
        stop = (shape[0] if shape else 1) if rows is None else start + rows
        parts: list[Tensor] = []
        at = start
        with ExitStack() as stack:
            for piece in sorted(self.pieces[name], key=lambda p: p.start):
                low, high = max(at, piece.start), min(stop, piece.start + piece.rows)
                if low != at or low >= high:
                    continue
                file = stack.enter_context(safe_open(self._paths[piece.file], framework="pt"))
                whole = not shape or (low, high) == (piece.start, piece.start + piece.rows)
                part = file.get_tensor(name) if whole else file.get_slice(name)[low - piece.start : high - piece.start]
                parts.append(part)
                at = high
        if at < stop:
            raise CheckpointError(f"rows {at} to {stop} of {name!r} are in no file of the checkpoint")
        if not parts:
            dtype = self._dtype(name)
            return torch.empty([0, *shape[1:]], dtype=dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _dtype(self, name: str) -> torch.dtype:
        piece = self.pieces[name][0]
        with safe_open(self._paths[piece.file], framework="pt") as file:
            return file.get_tensor(name).dtype
