"""Which implementation serves a call: eager or Triton, and of Triton's two strategies the one that the table names."""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from halos_kernels import eager
from halos_kernels.chunks import Chunk
from halos_kernels.inputs import Inputs, LogpOut, Upstream

IMPLS = ("auto", "triton", "eager")
STRATEGIES = ("tiled", "chunked")
DESCRIPTORS = ("sm_90", "sm_100")
"""Architectures whose tiles are copied by tensor descriptor. Others read by pointers, which any GPU can."""

_log = logging.getLogger("halos_kernels")
_forced: str | None = None


class Implementation(Protocol):
    """What a module must define to serve `linear_logp`; `halos_kernels.eager` is the one that defines the values."""

    def forward(self, inputs: Inputs, *, entropy: bool) -> LogpOut: ...

    def forward_frozen(self, inputs: Inputs) -> tuple[Tensor, ...]: ...

    def dlogits(self, inputs: Inputs, upstream: Upstream) -> Iterator[Chunk]: ...


def check_impl(impl: str, name: str = "impl") -> None:
    if not isinstance(impl, str) or impl not in IMPLS:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def implementation(impl: str, inputs: Inputs) -> Implementation:
    """The module that serves this call: a function of its shapes, dtypes and device alone, not of values or history.

    Raises:
        ValueError: `impl="triton"` for a call that Triton cannot serve here, with the reason.
    """
    unsupported = "float64 is computed by impl='eager' only" if inputs.dtype == torch.float64 else None
    if not use_triton(impl, inputs.hidden.device, unsupported) or inputs.hidden.shape[0] == 0:  # nothing to launch
        return eager
    from halos_kernels import chunked, tiled

    name = _forced or strategy(architecture(inputs.hidden.device), inputs)
    if name == "tiled" and not tiled.serves(inputs):
        if _forced:
            raise ValueError("the tiled strategy needs hidden and weight in one half precision, with contiguous rows")
        name = "chunked"
    if impl == "auto":
        _tell(f"Triton, {name}")
    return tiled if name == "tiled" else chunked


def use_triton(impl: str, device: torch.device, unsupported: str | None = None) -> bool:
    """Whether Triton serves a call; `unsupported` says why it could not on any device.

    HALOS_IMPL in the environment stands for the `impl` of calls that leave it at "auto".

    Raises:
        ValueError: "triton" where it cannot, with the reason; HALOS_IMPL is none of `IMPLS`.
    """
    wanted, name = impl, "impl"
    if impl == "auto" and os.environ.get("HALOS_IMPL"):
        wanted, name = os.environ["HALOS_IMPL"], "HALOS_IMPL"
        check_impl(wanted, name)
    if wanted == "eager":
        return False
    reason = unsupported or obstacle(device)
    if wanted == "triton" and reason:
        raise ValueError(f"{name}='triton' cannot serve this call: {reason}")
    if wanted == "triton" or not (reason or interpreting()):
        return True
    if impl == "auto":
        _tell(f"eager ({reason or 'in the interpreter Triton is slow: only when asked for'})")
    return False


def forward_multi(impl: str, calls: Sequence[Inputs], *, entropy: bool) -> list[LogpOut]:
    """Outputs of several calls on the same targets; pairs that the tiled strategy can take together share a launch."""
    served = [implementation(impl, call) for call in calls]
    outs: list[LogpOut] = []
    while len(outs) < len(calls):
        i = len(outs)
        together = getattr(served[i], "forward_pair", None)
        if together and i + 1 < len(calls) and served[i + 1] is served[i] and alike(calls[i], calls[i + 1]):
            outs += together(calls[i], calls[i + 1], entropy=entropy)
        else:
            outs.append(served[i].forward(calls[i], entropy=entropy))
    return outs


def alike(first: Inputs, second: Inputs) -> bool:
    """Whether one launch can take both: shapes, dtypes, strides and transform."""

    def signature(inputs: Inputs) -> tuple[Any, ...]:
        tensors = (inputs.hidden, inputs.weight, inputs.bias)
        return inputs.transform, *(x if x is None else (x.shape, x.dtype, x.stride()) for x in tensors)

    return signature(first) == signature(second)


def obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device; None where they can."""
    if device.type not in ("cpu", "cuda"):
        return f"there are no kernels for {device.type}"
    if broken := _import_error():
        return broken
    if interpreting():
        return None
    if device.type == "cpu":
        return "no GPU is in use (on the CPU Triton needs its interpreter: TRITON_INTERPRET=1 from the start)"
    name = architecture(device)
    if name.startswith("sm_") and int(name[3:]) < 80:
        return f"the kernels need compute capability 8.0, this GPU has {name[3:-1]}.{name[-1]}"
    return None


@functools.cache
def _import_error() -> str | None:
    try:
        importlib.import_module("halos_kernels.jit.math")
    except Exception as error:  # a broken install fails in its own way
        return f"Triton cannot be imported ({error})"
    return None


@functools.cache
def interpreting() -> bool:
    """Whether the kernels of this process run in Triton's interpreter, which was decided when they were imported."""
    from halos_kernels.jit.math import INTERPRET

    return INTERPRET


def strategy(arch: str, inputs: Inputs) -> str:
    """The first row of the table that fits architecture, bits of the operands, and the spans of N, V and d."""
    (rows, d), vocabulary = inputs.hidden.shape, inputs.weight.shape[0]
    call = {"arch": arch, "bits": 8 * inputs.operand.itemsize}
    sizes = {"N": rows, "V": vocabulary, "d": d}
    for row in table()["strategies"]:
        same = all(row.get(name, value) == value for name, value in call.items())
        if same and all(row[name][0] <= value <= row[name][1] for name, value in sizes.items() if name in row):
            return str(row["strategy"])
    raise AssertionError("the table's last row fits every call")


@functools.cache
def table() -> dict[str, Any]:
    """`tuned.json`: tiles of each kernel and the strategies, by architecture."""
    return dict(json.loads(Path(__file__).with_name("tuned.json").read_text(encoding="utf-8")))


def tile(kernel: str, arch: str) -> dict[str, int]:
    """Block sizes, warps and pipeline stages of a kernel. A GPU without tiles of its own takes its maker's smallest."""
    tiles = table()["tiles"]
    own = tiles.get(arch, tiles["sm_80" if arch.startswith("sm_") else "gfx942"])
    return dict(own[kernel] if kernel in own else tiles["any"][kernel])


@functools.cache
def architecture(device: torch.device) -> str:
    """sm_90, gfx942, …, or "interpreter"."""
    if interpreting() or device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Within this context Triton takes the strategy "tiled" or "chunked", whatever the table says: for measuring it.

    Of all threads: the backward pass of a GPU runs in one of its own.
    """
    global _forced
    if name not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _tell(path: str) -> None:
    """Once for each path in a process."""
    _log.info("impl='auto' takes %s", path)
