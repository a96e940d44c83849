"""Rows of tokens; the estimates themselves are tested with the objective that uses them, in test_ppo.py."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from halos_pl.losses import ppo_offline_loss
from halos_pl.losses.advantage import generalized_advantage, rows_of


def test_rows_of_tokens():
    assert rows_of(torch.tensor([2, 1, 3]), 6).tolist() == [0, 0, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="add up to the 6 tokens, got"):
        rows_of(torch.tensor([2, 1]), 6)


@pytest.mark.parametrize("shape", [(), (1, 3)])
def test_values_lie_in_a_line(shape):
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"value must be \[N\], got"):
        generalized_advantage(x, x, torch.tensor([3]), gamma=1.0, gae_lambda=1.0)


def test_a_token_without_an_advantage_costs_nothing_however_likely_it_became():
    logratio = torch.tensor([1e30, -1e30, 0.0, 1e4], requires_grad=True)
    loss = ppo_offline_loss(logratio, torch.zeros(4), clip_low=0.5, clip_high=2.0)
    assert loss.tolist() == [0.0] * 4


def test_docstring_examples():
    module = importlib.import_module("halos_pl.losses.advantage")
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0
