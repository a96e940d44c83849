"""Expected numbers are derived by hand with the math module in float64: the first version of KTO, whose
reference points are clamped means over the other half of the batch, which gradients flow through."""

from __future__ import annotations

import doctest
import importlib
import math
import re

import pytest
import torch

from halos_pl.batch import CompletionLogps
from halos_pl.losses import KTOv1, kto_v1_loss

DESIRABLE = [True, False, True, False, False, True]
BATCHES = {
    "both means positive": [1.5, 2.0, -0.4, -0.5, 0.9, 3.0],
    "only the undesirable": [-1.5, 2.0, -0.4, -0.5, 0.9, 0.3],
    "only the desirable": [1.5, -2.0, -0.4, -0.5, 0.9, 3.0],
    "neither": [-1.5, -2.0, -0.4, -0.5, 0.9, -3.0],
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def truth(r, desirable, beta):
    """Losses, and the gradient of their sum. A log-ratio acts on its own loss and, where the clamp lets it through, as
    1/n of its half's mean on every loss of the other half."""
    half = {label: [x for x, d in zip(r, desirable, strict=True) if d is label] for label in (True, False)}
    mean = {label: sum(x) / len(x) for label, x in half.items()}
    sign = [1 if d else -1 for d in desirable]
    gain = [s * beta * (x - max(0, mean[not d])) for s, x, d in zip(sign, r, desirable, strict=True)]
    own = [-s * beta * sigmoid(g) * sigmoid(-g) for s, g in zip(sign, gain, strict=True)]
    pull = {label: -sum(g for g, d in zip(own, desirable, strict=True) if d is label) for label in half}
    through = {label: (mean[label] > 0) * pull[not label] / len(half[label]) for label in half}
    return [1 - sigmoid(g) for g in gain], [g + through[d] for g, d in zip(own, desirable, strict=True)]


def inputs(r, desirable=DESIRABLE, dtype=torch.float64):
    return torch.tensor(r, dtype=dtype, requires_grad=True), torch.tensor(desirable)


@pytest.mark.parametrize("r", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("beta", [0.1, 0.8])
@pytest.mark.parametrize("desirable", [DESIRABLE, [True] * 3 + [False] * 3, [False] * 3 + [True] * 3])
def test_losses_and_gradients_by_hand(r, beta, desirable):
    logratio, labels = inputs(r, desirable)
    loss = kto_v1_loss(logratio, labels, beta=beta)
    loss.sum().backward()
    losses, gradient = truth(r, desirable, beta)
    assert loss.tolist() == pytest.approx(losses, rel=1e-12)
    assert logratio.grad.tolist() == pytest.approx(gradient, rel=1e-12, abs=1e-16)


@pytest.mark.parametrize("r", BATCHES.values(), ids=BATCHES)
def test_finite_differences(r):
    logratio, labels = inputs(r)
    assert torch.autograd.gradcheck(lambda x: kto_v1_loss(x, labels, beta=0.7), (logratio,))


def test_a_pair_in_numbers():
    """r = 3 and 1 at β = 1: the desirable gains 3 − 1 = 2, the undesirable 3 − 1 = 2; each sees the other's mean."""
    logratio, labels = inputs([3.0, 1.0], [True, False])
    loss = kto_v1_loss(logratio, labels, beta=1.0)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([sigmoid(-2)] * 2, rel=1e-12)
    slope = 2 * sigmoid(2) * sigmoid(-2)  # once by itself, once through the reference point
    assert logratio.grad.tolist() == pytest.approx([-slope, slope], rel=1e-12)


def test_policy_equal_to_reference():
    loss = kto_v1_loss(*inputs([0.0] * 6), beta=0.1)
    assert loss.tolist() == [0.5] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4], [-1e4, -1e4]])
def test_extreme_logratios_stay_finite(dtype, r):
    logratio, labels = inputs(r, [True, False], dtype)
    loss = kto_v1_loss(logratio, labels, beta=1.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logratio.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_stays(dtype):
    assert kto_v1_loss(*inputs([1.0] * 6, dtype=dtype), beta=0.1).dtype == dtype


@pytest.mark.parametrize("desirable", [[True, True, False], [True, False, False, False], [True, True], [False], [True]])
def test_halves_must_be_equal(desirable):
    with pytest.raises(ValueError, match="desirable"):
        kto_v1_loss(torch.zeros(len(desirable)), torch.tensor(desirable), beta=0.1)


@pytest.mark.parametrize(
    ("logratio", "desirable", "name"),
    [
        (torch.zeros(2).long(), [True, False], "logratio"),
        (torch.tensor([0.0, math.nan]), [True, False], "logratio"),
        (torch.zeros(2), [1.0, 0.0], "desirable"),
        (torch.zeros(2), [1, 0], "desirable"),
        (torch.zeros(2), [[True], [False]], "desirable"),
        (torch.zeros(4), [True, False], "desirable"),
    ],
)
def test_bad_tensors_are_named(logratio, desirable, name):
    with pytest.raises(ValueError, match=name):
        kto_v1_loss(logratio, torch.tensor(desirable), beta=0.1)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan, "0.1"])
def test_bad_beta_is_named_by_the_function_and_by_the_objective(beta):
    message = re.escape(f"beta must be a finite number > 0, got {beta!r}")
    with pytest.raises(ValueError, match=message):
        kto_v1_loss(*inputs([0.0] * 6), beta=beta)
    with pytest.raises(ValueError, match=message):
        KTOv1(beta)


def test_objective():
    logratio, labels = inputs(BATCHES["both means positive"])
    nan = torch.full_like(logratio, math.nan)  # KTOv1 must read nothing but the log-ratio
    zero = torch.zeros(6, dtype=torch.int64)
    scores = CompletionLogps(logratio, logp=nan, length=zero, token_logp=nan, ref_logp=nan, token_logratio=nan)
    assert torch.equal(KTOv1(0.4).losses(scores, labels, None), kto_v1_loss(logratio, labels, beta=0.4))
    assert KTOv1() == KTOv1(beta=0.1)
    assert KTOv1().reference_point_from == "none"  # its reference points are the batch's own
    assert KTOv1.equal_halves
    rewards = KTOv1(0.4).rewards(scores)
    assert rewards.tolist() == pytest.approx([0.4 * x for x in logratio.tolist()])
    assert not rewards.requires_grad
    with pytest.raises(ValueError, match="desirable"):
        KTOv1().losses(scores, None, None)


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.losses.kto_v1"))
    assert result.attempted
    assert not result.failed
