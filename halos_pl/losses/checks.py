"""The checks that the losses share: ValueError with the name and the value of what is out of range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class NaNError(ValueError):
    """A log-probability or log-ratio is not a number."""


_nan_passes = ContextVar("nan_passes", default=False)


@contextmanager
def nan_passes(allowed: bool = True) -> Iterator[None]:
    """Within this context a NaN is no error: it goes through to the loss, where all ranks find it together.

    Args:
        allowed: False changes nothing.
    """
    token = _nan_passes.set(allowed or _nan_passes.get())
    try:
        yield
    finally:
        _nan_passes.reset(token)


def check_positive(name: str, value: float, *, or_zero: bool = False) -> None:
    """Raises ValueError unless `value` is finite and > 0 (`or_zero`: or 0)."""
    if not (_is_number(value) and math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
        raise ValueError(f"{name} must be a finite number {'>=' if or_zero else '>'} 0, got {value!r}")


def check_range(name: str, value: float, interval: str) -> None:
    """Raises ValueError unless `value` lies in an interval such as "[0, 0.5)"."""
    low, high = map(float, interval[1:-1].split(","))
    inside = _is_number(value) and low <= value <= high
    if not inside or (value == low and interval[0] == "(") or (value == high and interval[-1] == ")"):
        raise ValueError(f"{name} must be in {interval}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_floating(**tensors: Tensor) -> None:
    """Raises ValueError unless every tensor is floating point, all have one shape and dtype, and none holds a NaN (on
    the CPU and outside `nan_passes`: elsewhere the look would wait for the device, and the step refuses a loss that is
    not finite)."""
    (first, leader), *_ = tensors.items()
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if x.shape != leader.shape or x.dtype != leader.dtype:
            got = f"{list(x.shape)}" + (f" {x.dtype}" if x.dtype != leader.dtype else "")
            raise ValueError(f"{name} must be {list(leader.shape)} like {first}, got {got}")
        if readable(x) and not _nan_passes.get() and (bad := x.isnan()).any():
            raise NaNError(f"{name} must not be NaN, got {int(bad.sum())} NaN of {x.numel()} values")


def check_lengths(leader: Tensor, **lengths: Tensor) -> None:
    """Raises ValueError unless lengths are integer tensors of the leader's shape, at least 1 each."""
    for name, x in lengths.items():
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool or x.shape != leader.shape:
            raise ValueError(f"{name} must be integers {list(leader.shape)}, got {x.dtype} {list(x.shape)}")
        if readable(x) and (x < 1).any():
            raise ValueError(f"{name} must be at least 1, got {int(x.min())}")


def check_labels(desirable: Tensor, leader: Tensor) -> None:
    """Raises ValueError unless the labels are bool and of the leader's shape."""
    if not isinstance(desirable, Tensor):
        raise ValueError(f"desirable must be a tensor of bool {list(leader.shape)} like logratio, got {desirable!r}")
    if desirable.dtype != torch.bool or desirable.shape != leader.shape:
        expected = f"bool {list(leader.shape)} like logratio"
        raise ValueError(f"desirable must be {expected}, got {desirable.dtype} {list(desirable.shape)}")


def readable(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
