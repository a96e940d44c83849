"""Human value functions: prospect theory's, and those that losses imply."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

ValueFunction = Literal["rlhf", "dpo", "slic", "ppo", "kto", "kahneman_tversky"]
VALUE_FUNCTIONS: tuple[ValueFunction, ...] = get_args(ValueFunction)
"""The names that `implied_value` knows."""

LINEAR_WITHIN = 1e-3
"""`kahneman_tversky` is a straight line this close to the reference point."""


def kahneman_tversky(
    z: Tensor, z0: Tensor | float = 0.0, *, alpha: float = 0.88, loss_aversion: float = 2.25
) -> Tensor:
    """How much an outcome is worth to a human: concave in gains, convex and steeper in losses (KTO report, equation 6).

        v(z) = (z − z0)^alpha                       for z ≥ z0
        v(z) = −loss_aversion · (z0 − z)^alpha      for z < z0

    At z0 the true slope is infinite, and z0 is where training starts (policy == reference). Within δ = 10⁻³ of it the
    power x^alpha is therefore replaced by its chord x·δ^(alpha − 1): continuous, 0 at z0, its slope finite everywhere.

    Args:
        z: Outcomes, any shape, floating point.
        z0: The reference point: a number, 0-d, or of z's shape.
        alpha: Exponent in (0, 1]; smaller is more risk-averse. The default is the median human's.
        loss_aversion: > 0; how much more a loss weighs than a gain of the same size.

    Returns:
        Values of z's shape and dtype.

    Raises:
        ValueError: on another shape or dtype, or a number out of range.

    Example:
        >>> import torch
        >>> kahneman_tversky(torch.tensor([-1.0, 0.0, 1.0, 16.0]), alpha=0.5).tolist()
        [-2.25, 0.0, 1.0, 4.0]
    """
    if not (isinstance(alpha, (int, float)) and 0 < alpha <= 1):
        raise ValueError(f"alpha must be in (0, 1], got {alpha!r}")
    if not (isinstance(loss_aversion, (int, float)) and 0 < loss_aversion < math.inf):
        raise ValueError(f"loss_aversion must be a finite number > 0, got {loss_aversion!r}")
    if not z.is_floating_point():
        raise ValueError(f"z must be floating point, got {z.dtype}")
    if isinstance(z0, Tensor):
        if z0.ndim and z0.shape != z.shape:
            raise ValueError(f"z0 must be 0-d or {list(z.shape)} like z, got {list(z0.shape)}")
        z0 = z0.to(z.dtype)
    x = z - z0
    size = x.abs()
    power = x.sign() * size.clamp(min=LINEAR_WITHIN) ** alpha
    value = torch.where(size < LINEAR_WITHIN, x * LINEAR_WITHIN ** (alpha - 1), power)
    return torch.where(x < 0, loss_aversion * value, value)


def implied_value(name: ValueFunction, z: Tensor, *, beta: float) -> Tensor:
    """The human value of an outcome that a loss implies (KTO report, figure 4).

        rlhf              v(z) = β·z
        dpo               v(z) = log σ(β·z)
        slic              v(z) = min(0, z − β)                     β is the margin, z = ℓ_w − ℓ_l, reference uniform
        ppo               v(z) = clamp(z, log 0.5, log 2)          the printed log form; β does not enter
        kto               v(z) = σ(β·z)
        kahneman_tversky  v(z) = `kahneman_tversky`(β·z)           α = 0.88, λ = 2.25: the median human's

    None falls anywhere, and all are concave in gains. They differ in the value of the reference point: shift them to
    v(z) − v(0) before you compare.

    Args:
        name: One of `VALUE_FUNCTIONS`.
        z: Reward minus reference point in nats, any shape, floating point; the reward is log π/π_ref.
        beta: Finite, > 0; scales z, but for slic and ppo.

    Returns:
        Values of z's shape and dtype.

    Raises:
        ValueError: on an unknown name, another dtype, or a beta out of range.

    Example:
        >>> import torch
        >>> implied_value("slic", torch.tensor([-1.0, 0.0, 1.0, 2.0]), beta=1.0).tolist()
        [-2.0, -1.0, 0.0, 0.0]
    """
    if name not in VALUE_FUNCTIONS:
        raise ValueError(f"name must be one of {', '.join(VALUE_FUNCTIONS)}, got {name!r}")
    if not (isinstance(beta, (int, float)) and 0 < beta < math.inf):
        raise ValueError(f"beta must be a finite number > 0, got {beta!r}")
    if not z.is_floating_point():
        raise ValueError(f"z must be floating point, got {z.dtype}")
    if name == "rlhf":
        return beta * z
    if name == "dpo":
        return logsigmoid(beta * z)
    if name == "slic":
        return (z - beta).clamp(max=0)
    if name == "ppo":
        return z.clamp(-math.log(2), math.log(2))
    if name == "kto":
        return torch.sigmoid(beta * z)
    return kahneman_tversky(beta * z)
