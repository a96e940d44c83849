"""What was written is what is read, by however many ranks. Truth: random tensors, cut by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from halos_pl.checkpoints import CheckpointError
from halos_pl.checkpoints.tensors import KEY, TensorFiles, write_tensors


def tensors() -> dict[str, Tensor]:
    """Every shape and type that an optimizer or a model may bring."""
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(6, 6, generator=generator)
    return {
        "matrix": torch.randn(7, 3, generator=generator),
        "vector": torch.randn(5, generator=generator),
        "deep": torch.randn(3, 2, 4, generator=generator),
        "number": torch.tensor(3.25),
        "one": torch.tensor([7]),
        "empty": torch.empty(0, 4),
        "hollow": torch.empty(3, 0),
        "half": torch.randn(4, 2, generator=generator).bfloat16(),
        "double": torch.randn(4, generator=generator).double(),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "turned": square.T,
        "every other": square[::2, 1::2],
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))


@pytest.mark.parametrize("full", [True, False])
def test_round_trip(full: bool, tmp_path: Path) -> None:
    state = tensors()
    path = write_tensors(state, tmp_path, full=full)
    assert path == tmp_path / "tensors-00000-of-00001.safetensors"
    files = TensorFiles([path])
    assert files.shapes == {name: list(x.shape) for name, x in state.items()}
    for name, value in state.items():
        assert same(files.rows(name), value.reshape(value.shape)), name
        if value.dim() and value.numel():
            for start in range(len(value)):
                for rows in range(len(value) - start + 1):
                    assert same(files.rows(name, start, rows), value[start : start + rows]), (name, start, rows)


def written_by(world: int, state: dict[str, Tensor], folder: Path) -> list[Path]:
    """As each of so many ranks writes torch.chunk's share of the rows; of some tensors there are fewer than ranks."""
    paths = []
    for rank in range(world):
        mine, pieces = {}, {}
        for name, value in state.items():
            chunk = -(-len(value) // world)
            part = value[rank * chunk : (rank + 1) * chunk]
            if len(part):
                mine[name], pieces[name] = part.contiguous(), (rank * chunk, list(value.shape))
        paths.append(folder / f"tensors-{rank:05}-of-{world:05}.safetensors")
        save_file(mine, paths[-1], metadata={KEY: json.dumps(pieces)})
    return paths


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_what_another_wrote(world: int, tmp_path: Path) -> None:
    state = {name: x for name, x in tensors().items() if x.dim() and x.numel()}
    files = TensorFiles(written_by(world, state, tmp_path))
    assert files.shapes == {name: list(x.shape) for name, x in state.items()}
    for name, value in state.items():
        assert same(files.rows(name), value), name
        for readers in (1, 2, 3, 4, 8):
            chunk = -(-len(value) // readers)
            for rank in range(readers):
                start = min(rank * chunk, len(value))
                rows = min(chunk, len(value) - start)
                assert same(files.rows(name, start, rows), value[start : start + rows]), (name, rank, readers)


def test_what_no_file_has_is_told(tmp_path: Path) -> None:
    paths = written_by(3, {"matrix": tensors()["matrix"]}, tmp_path)
    with pytest.raises(CheckpointError, match="holds no 'other'"):
        TensorFiles(paths).rows("other")
    for left_out, rows in ((paths[0], "0 to 7"), (paths[1], "3 to 7"), (paths[2], "6 to 7")):
        with pytest.raises(CheckpointError, match=f"rows {rows} of 'matrix' are in no file"):
            TensorFiles([x for x in paths if x != left_out]).rows("matrix")
    with pytest.raises(CheckpointError, match="rows 7 to 9"):
        TensorFiles(paths).rows("matrix", 5, 4)


@pytest.mark.parametrize("content", [b"", b"garbage" * 9, b"\xff" * 64])
def test_a_file_that_is_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors cannot be read"):
        TensorFiles([path])
