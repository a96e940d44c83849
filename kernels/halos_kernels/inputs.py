"""What every implementation works on: one checked call, and how its logits follow from the product."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class LogpOut(NamedTuple):
    """What `linear_logp` returns, all in nats."""

    logp: Tensor  # [N] log-probability of the target
    lse: Tensor  # [N] log-sum-exp of the logits; carries no gradient
    entropy: Tensor | None  # [N] of the next-token distribution, where asked for


class Upstream(NamedTuple):
    """What the backward pass knows of each token: outputs, and their gradients. All [N], contiguous."""

    lse: Tensor
    logp: Tensor  # gradient of logp; zeros where nothing depends on it
    entropies: Tensor  # the outputs, or lse again where `entropy` is None: a kernel wants some pointer
    entropy: Tensor | None  # gradient of the entropies


class Transform(NamedTuple):
    """From u = hidden · weight + bias to a logit z: u·inner, or outer·tanh(u·inner) where logits are capped."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def inner(self) -> float:
        return self.scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def outer(self) -> float:
        return 1.0 if self.softcap is None else self.softcap / self.temperature

    @property
    def slope(self) -> float:
        """∂z/∂u, but for the factor 1 − tanh² of a cap."""
        return self.scale / self.temperature


class Inputs(NamedTuple):
    """One call, or a block of its rows."""

    hidden: Tensor  # [N, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N]
    transform: Transform
    tokens: int  # of the whole call

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, sums and outputs: float32, or float64 if any input is."""
        dtypes = (x.dtype for x in (self.hidden, self.weight, self.bias) if x is not None)
        return reduce(torch.promote_types, dtypes, torch.float32)

    @property
    def operand(self) -> torch.dtype:
        """Of the products' factors: the inputs' where the device multiplies half precision to float32, else `dtype`."""
        native = self.hidden.is_cuda and self.hidden.dtype == self.weight.dtype and self.hidden.dtype in HALF
        return self.hidden.dtype if native and self.dtype == torch.float32 else self.dtype

    def rows(self, rows: slice) -> Inputs:
        return self._replace(hidden=self.hidden[rows], targets=self.targets[rows])


def check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: Transform,
) -> None:
    """Everything about a call but the values of its targets.

    Raises:
        ValueError: names the argument and what it got.
    """
    floats = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, x in {**floats, "targets": targets}.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if hasattr(x, "placements"):
            raise ValueError(
                f"{name} must be a plain tensor, got a DTensor: call this inside the forward of the module that owns "
                "it (where FSDP has gathered it), or gather it first (`full_tensor`)"
            )
        refuse_tangent(name, x)
        if x.layout != torch.strided:
            raise ValueError(f"{name} must be dense, got layout {x.layout}")
        if x.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {x.device}")
        allowed = INTEGERS if name == "targets" else FLOATS
        if x.dtype not in allowed:
            raise ValueError(f"{name} must have one of the dtypes {', '.join(map(str, allowed))}, got {x.dtype}")
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [N, d], got {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be [V, {hidden.shape[1]}] with V > 0, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}], got {list(targets.shape)}")
    _check_number("logit_scale", transform.scale, positive=False)
    _check_number("temperature", transform.temperature)
    if transform.softcap is not None:
        _check_number("softcap", transform.softcap)


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """ValueError (on CUDA a device-side assertion) unless all are in [0, V)."""
    require_values(
        ((targets >= 0) & (targets < vocabulary)).all(),
        lambda: (
            f"targets must be in [0, {vocabulary}), got {targets.min().item()} to {targets.max().item()}; "
            "select the rows to score first, there is no ignore_index"
        ),
    )


def refuse_tangent(name: str, x: Tensor) -> None:
    """Operators of `torch.library` would drop it in silence."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(f"{name} carries a tangent of forward-mode differentiation: only reverse mode is supported")


def require_values(ok: Tensor, message: Callable[[], str]) -> None:
    """Raises ValueError if `ok` (0-d bool) is false; on CUDA asserts on the device instead, unless `HALOS_CHECK=1`."""
    if ok.is_cuda and os.environ.get("HALOS_CHECK") != "1":
        torch._assert_async(ok, "halos_kernels: value out of range; run with HALOS_CHECK=1 to see which")
    elif not ok:
        raise ValueError(message())


def check_entropy(entropy: object) -> None:
    if not isinstance(entropy, bool):
        raise ValueError(f"entropy must be True or False, got {entropy!r}")


def _check_number(name: str, value: object, *, positive: bool = True) -> None:
    """In float32 the bounds are far from anything that overflows; they also keep NaN out."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 <= value <= 1e30
    if not number or (positive and not value >= 1e-30):  # type: ignore[operator]
        raise ValueError(f"{name} must be a finite number{' > 0' if positive else ''} (up to 1e30), got {value!r}")
