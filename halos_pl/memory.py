"""Out of memory, in words that help: what did not fit, and which setting would make it fit."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from halos_pl.batch import Batch, Sequences

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MARGIN = 0.9
"""Of the memory that is advised to be filled: the allocation that failed need not have been the last."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    signs = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


@dataclass(frozen=True)
class Shape:
    """What a batch asks memory for, known on the host."""

    examples: int
    rows: int  # two an example for pairs
    longest: int  # tokens, padding included
    padded: int  # tokens of all rows, padding included
    mismatched_rows: int = 0
    mismatched_padded: int = 0

    @classmethod
    def of(cls, batch: Batch) -> Shape:
        rows, other = batch.completions, batch.mismatched
        blocks = [*rows.blocks, *(other.blocks if other else ())]
        longest = max((block.shape[1] for block in blocks), default=0)
        more = (other.num_rows, _padded(other)) if other else (0, 0)
        return cls(batch.num_examples, rows.num_rows, longest, _padded(rows), *more)

    def __str__(self) -> str:
        told = f"{self.rows} rows, {self.padded:,} tokens with padding, the longest row {self.longest:,}"
        if self.mismatched_rows:
            told += f"; {self.mismatched_rows} rows (x, y′), {self.mismatched_padded:,} tokens"
        return told


def _padded(rows: Sequences) -> int:
    return sum(block.shape[0] * block.shape[1] for block in rows.blocks)


@dataclass(frozen=True)
class Device:
    """Memory of a device in bytes; zeros where it is not known, as on the CPU."""

    total: int = 0
    resting: int = 0  # held when the step began: weights, gradients, state of the optimizer
    peak: int = 0  # held at most until now
    reserved: int = 0  # taken from the device, used or not

    @classmethod
    def now(cls, device: torch.device, resting: int) -> Device:
        if device.type != "cuda":
            return cls()
        total = torch.cuda.get_device_properties(device).total_memory
        return cls(total, resting, torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device))


@dataclass(frozen=True)
class Settings:
    """Of the run, as far as they decide about memory."""

    batch_size: int
    max_tokens: int | None = None
    accumulate: int = 1
    checkpointing: bool = False


def requested(message: str) -> int:
    """The bytes that an allocator says it was asked for; 0 where it does not say."""
    if found := re.search(r"[Tt]ried to allocate ([\d.]+) ?([KMGT]?)(?:iB|B|bytes)", message):
        return int(float(found[1]) * _UNITS[found[2]])
    return 0


def explain(error: BaseException, where: str, shape: Shape | None, device: Device, settings: Settings) -> str:
    """What was being done with which batch, how much memory there is, and what to lower to what.

    Args:
        error: of the allocator.
        where: it came from, in words that complete "out of memory in".
        shape: of the batch at hand, if one was.
        device: its memory.
        settings: of the run.
    """
    asked = requested(str(error))
    batch = f", a batch of {shape}" if shape else ""
    lines = [f"out of memory in {where}{batch}"]
    if asked or device.total:
        parts = [f"{_gib(asked)} more were asked for"] if asked else []
        if device.total:
            parts += [f"the device has {_gib(device.total)}", f"{_gib(device.resting)} of it held between steps"]
        lines.append("; ".join(parts))
    share = _share(device, asked)
    if share == 0:
        lines.append(
            "weights, gradients and optimizer alone leave no room: a smaller batch will not help; shard over more "
            "devices, train fewer parameters or in a smaller --model.dtype, or take a smaller model"
        )
    else:
        lines.append("try " + ", or ".join(_remedies(shape, settings, share)))
    if device.reserved and device.reserved - device.peak > device.total / 10:
        lines.append(
            f"{_gib(device.reserved - device.peak)} are lost between blocks: PYTORCH_CUDA_ALLOC_CONF="
            "expandable_segments:True gives them back"
        )
    return "\n".join([*lines, f"({str(error).splitlines()[0]})"])


def _share(device: Device, asked: int) -> float:
    """How much of the batch would have fitted: at most a half where that is not known, 0 where nothing would."""
    room = device.total - device.resting
    if not device.total:
        return 0.5
    if room < device.total / 20:
        return 0.0
    return min(0.5, _MARGIN * room / max(1, device.peak - device.resting + asked))


def _remedies(shape: Shape | None, settings: Settings, share: float) -> list[str]:
    found, one = [], 0 if shape is None else shape.longest * (shape.rows // max(1, shape.examples))
    size, step = settings.batch_size, "--trainer.accumulate_grad_batches"
    if settings.max_tokens is not None and int(settings.max_tokens * share) >= max(1, one):
        fits = int(settings.max_tokens * share)
        times = -(-settings.max_tokens // fits) * settings.accumulate
        found.append(f"--data.max_tokens {fits} (from {settings.max_tokens}) with {step} {times}")
    elif settings.max_tokens is None and size > 1:
        fits = max(n for n in range(1, size) if size % n == 0 and (n == 1 or n <= size * share))
        times = size // fits * settings.accumulate
        found.append(f"--data.batch_size {fits} (from {size}) with {step} {times}: as many rows a step")
        if shape and shape.examples > 1:
            bound = max(one, int(shape.padded * share))
            found.append(f"--data.max_tokens {bound}, which cuts long batches only, with --data.group_by_length true")
    elif shape:
        found.append(
            f"--data.max_length {max(2, int(shape.longest * share))}, for one row of {shape.longest} is too long"
        )
    if not settings.checkpointing:
        found.append("--model.gradient_checkpointing true, which recomputes activations instead of keeping them")
    return found or ["a shorter --data.max_length"]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
