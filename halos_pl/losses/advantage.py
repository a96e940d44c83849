"""Advantages of tokens, estimated with a value head (Schulman et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from halos_pl.losses.checks import check_floating, check_lengths, check_range, readable


def generalized_advantage(
    value: Tensor, reward: Tensor, length: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token (Schulman et al. 2016, equation 16). Each row is an episode of its own.

        δ_t = reward_t + gamma·value_{t+1} − value_t        value is 0 after a row's last token
        advantage_t = Σ_k (gamma·gae_lambda)^k δ_{t+k}      return_t = Σ_k gamma^k reward_{t+k}

    Args:
        value: [N] predicted return from each token on, row after row.
        reward: [N] of each token.
        length: [R] tokens of each row, Σ = N.
        gamma: Discount of a step, in [0, 1].
        gae_lambda: In [0, 1]: 0 trusts the next value, 1 the rewards.

    Returns:
        [N] advantages and [N] returns, without gradient.

    Raises:
        ValueError: on unequal shapes, inputs that are NaN or not floating point, or a number out of range.

    Example:
        >>> import torch
        >>> value, reward = torch.zeros(3), torch.tensor([0.0, 1.0, -1.0])
        >>> generalized_advantage(value, reward, torch.tensor([2, 1]), gamma=0.5, gae_lambda=1.0)[0]
        tensor([ 0.5000,  1.0000, -1.0000])
    """
    check_range("gamma", gamma, "[0, 1]")
    check_range("gae_lambda", gae_lambda, "[0, 1]")
    check_floating(value=value, reward=reward)
    if value.ndim != 1:
        raise ValueError(f"value must be [N], got {list(value.shape)}")
    value, reward, row = value.detach(), reward.detach(), rows_of(length, value.shape[0])
    following = torch.where(row[1:] == row[:-1], value[1:], 0.0)
    delta = reward + gamma * F.pad(following, (0, 1)) - value
    return _discounted(delta, row, gamma * gae_lambda), _discounted(reward, row, gamma)


def rows_of(length: Tensor, tokens: int) -> Tensor:
    """[N] the row of each token, for rows of `length` [R] tokens one after another."""
    check_lengths(length, length=length)
    if length.ndim != 1 or (readable(length) and int(length.sum()) != tokens):
        raise ValueError(f"length must be [R] and add up to the {tokens} tokens, got {length.tolist()}")
    return torch.repeat_interleave(torch.arange(length.shape[0], device=length.device), length, output_size=tokens)


def _discounted(x: Tensor, row: Tensor, discount: float) -> Tensor:
    """Σ_k discount^k x_{t+k} within each row, in log₂ N passes over all tokens."""
    step = 1
    while step < x.shape[0]:
        same = row[step:] == row[:-step]
        x = x + F.pad(torch.where(same, discount**step * x[step:], 0.0), (0, step))
        step *= 2
    return x
