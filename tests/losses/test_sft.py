from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch

from halos_pl.batch import CompletionLogps
from halos_pl.losses import CSFT, SFT, sft_loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradient(dtype):
    logp = torch.tensor([-0.5, -1e4, 0.0], dtype=dtype, requires_grad=True)
    loss = sft_loss(logp)
    loss.sum().backward()
    assert loss.dtype == dtype
    assert torch.equal(loss, torch.tensor([0.5, 1e4, 0.0], dtype=dtype))
    assert logp.grad.tolist() == [-1.0] * 3


def test_bad_dtype_is_named():
    with pytest.raises(ValueError, match=r"token_logp must be floating point, got torch\.int64"):
        sft_loss(torch.zeros(3, dtype=torch.int64))


def test_objective_reads_tokens_only_and_implies_no_reward():
    nan = torch.full((2,), math.nan)
    token_logp = torch.tensor([-1.0, -2.0, -4.0])
    scores = CompletionLogps(nan, logp=nan, length=nan, token_logp=token_logp)
    assert SFT().losses(scores, None, None).tolist() == [1.0, 2.0, 4.0]
    assert SFT().rewards(scores) is None


def test_conditional_objective_is_sft_of_labelled_completions():
    """The labels act through the control text of the prompts: the loss is that of good and bad tokens alike."""
    nan = torch.full((2,), math.nan)
    scores = CompletionLogps(nan, logp=nan, length=torch.zeros(2).long(), token_logp=torch.tensor([-1.0, -2.0, -4.0]))
    for objective in (CSFT(), CSFT(good="yes", bad="no")):
        assert objective.losses(scores, torch.tensor([True, False]), None).tolist() == [1.0, 2.0, 4.0]
        assert objective.rewards(scores) is None
    assert (CSFT.view, CSFT.unit, CSFT.needs_reference) == ("unpaired", "token", False)
    assert CSFT(good="yes", bad="no").control == ("yes", "no")
    assert SFT().control is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"good": " "}, "good must be a text, got ' '"),
        ({"bad": None}, "bad must be a text, got None"),
        ({"good": "x", "bad": "x"}, "good and bad must differ, got 'x' for both"),
    ],
)
def test_control_texts_must_tell_good_from_bad(fields, message):
    with pytest.raises(ValueError, match=message):
        CSFT(**fields)


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.losses.sft"))
    assert result.attempted
    assert not result.failed
