"""What to lower, and by how much, from the numbers of a device."""

from __future__ import annotations

import pytest
import torch

from halos_pl.batch import PairedBatch
from halos_pl.data.collate import sequences
from halos_pl.memory import Device, Settings, Shape, explain, is_out_of_memory, requested

GIB = 2**30
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 10.00 GiB. GPU 0 has a total capacity of …")
SHAPE = Shape(examples=16, rows=16, longest=900, padded=9000)


def test_the_shape_of_a_batch() -> None:
    rows = sequences([(torch.ones(2).numpy(), torch.ones(n).numpy()) for n in (1, 3)], pad_id=0, vocab_size=5)
    shape = Shape.of(PairedBatch(rows, rows))
    assert shape == Shape(examples=1, rows=2, longest=4, padded=8, mismatched_rows=2, mismatched_padded=8)
    assert str(shape) == "2 rows, 8 tokens with padding, the longest row 4; 2 rows (x, y′), 8 tokens"


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("Tried to allocate 2.50 GiB.", int(2.5 * GIB)),
        ("Tried to allocate 20.00 MiB.", 20 * 2**20),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.", 4096),
        ("no size", 0),
    ],
)
def test_what_was_asked_for(message: str, size: int) -> None:
    assert requested(message) == size


def test_only_missing_memory_counts() -> None:
    assert is_out_of_memory(ERROR)
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …"))
    assert not is_out_of_memory(RuntimeError("sizes do not match"))
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value)


def test_the_share_that_would_have_fitted() -> None:
    """80 GiB, 40 of them weights and optimizer: 40 are left for a batch that wanted 70 + 10 − 40 + … of them."""
    device = Device(total=80 * GIB, resting=40 * GIB, peak=110 * GIB, reserved=110 * GIB)
    told = explain(ERROR, "step 3", SHAPE, device, Settings(16))  # 0.9 · 40 / (70 + 10) = 0.45
    assert "10.00 GiB more were asked for; the device has 80.00 GiB; 40.00 GiB of it held between steps" in told
    assert "--data.batch_size 4 (from 16) with --trainer.accumulate_grad_batches 4" in told, "divides 16, at most 7.2"
    assert "--data.max_tokens 4050, which cuts long batches only" in told
    told = explain(ERROR, "step 3", SHAPE, device, Settings(16, max_tokens=10_000, accumulate=2, checkpointing=True))
    assert "--data.max_tokens 4500 (from 10000) with --trainer.accumulate_grad_batches 6" in told
    assert "gradient_checkpointing" not in told


def test_one_row_that_is_too_long() -> None:
    one = Shape(examples=1, rows=1, longest=900, padded=900)
    for settings in (Settings(1), Settings(8, max_tokens=1000)):
        told = explain(ERROR, "step 3", one, Device(), settings)
        assert "--data.max_length 450, for one row of 900 is too long" in told


def test_weights_that_leave_no_room() -> None:
    device = Device(total=80 * GIB, resting=79 * GIB, peak=79 * GIB, reserved=79 * GIB)
    told = explain(ERROR, "step 1", SHAPE, device, Settings(16))
    assert "a smaller batch will not help" in told
    assert "--data.batch_size" not in told


def test_memory_that_is_lost_between_blocks() -> None:
    device = Device(total=80 * GIB, resting=10 * GIB, peak=50 * GIB, reserved=75 * GIB)
    assert "25.00 GiB are lost between blocks: PYTORCH_CUDA_ALLOC_CONF" in explain(
        ERROR, "step 9", None, device, Settings(4)
    )
