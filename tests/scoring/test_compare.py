"""From token log-probabilities of two models to log-ratios of completions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halos_pl.batch import Sequences
from halos_pl.data.collate import sequences
from halos_pl.scoring import compare, per_token
from halos_pl.scoring.scorer import TokenScores

POLICY = [-1.0, -2.0, -4.0, -0.5, -0.25, -0.125]
REFERENCE = [-1.5, -2.0, -1.0, -0.5, -1.25, -2.125]


@pytest.fixture
def rows() -> Sequences:
    """Completions of 1, 3 and 2 tokens."""
    tokens = [(torch.ones(2).numpy(), torch.ones(n).numpy()) for n in (1, 3, 2)]
    return sequences(tokens, pad_id=0, vocab_size=5)


def out(values: list[float], entropy: Tensor | None = None) -> TokenScores:
    logp = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    return TokenScores(logp, entropy)


def test_sums_lengths_and_ratios(rows: Sequences) -> None:
    policy, reference, entropy = out(POLICY), out(REFERENCE), torch.arange(6.0)
    scores = compare(policy._replace(entropy=entropy), reference, rows)
    assert scores.logp.tolist() == [-1.0, -6.5, -0.375]
    assert scores.ref_logp is not None
    assert scores.ref_logp.tolist() == [-1.5, -3.5, -3.375]
    assert scores.logratio.tolist() == [0.5, -3.0, 3.0]
    assert scores.length.tolist() == [1, 3, 2]
    assert scores.token_logp is policy.logp
    assert scores.token_logratio is not None
    assert scores.token_logratio.tolist() == [0.5, 0.0, -3.0, 0.0, 1.0, 2.0]
    assert scores.entropy is entropy


def test_without_a_reference_the_ratio_is_the_log_probability(rows: Sequences) -> None:
    scores = compare(out(POLICY), None, rows)
    assert torch.equal(scores.logratio, scores.logp)
    assert scores.ref_logp is scores.token_logratio is None
    assert per_token(scores).logratio.tolist() == pytest.approx([-1.0, -6.5 / 3, -0.1875])
    assert torch.equal(per_token(scores).logp, scores.logp), "only the ratio is a mean"


def test_gradient_reaches_each_token_of_the_policy(rows: Sequences) -> None:
    policy = out(POLICY)
    scores = compare(policy, out(REFERENCE), rows)
    grad = torch.autograd.grad(scores.logratio @ torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), policy.logp)
    assert grad[0].tolist() == [1, 10, 10, 10, 100, 100]


def test_clamped_tokens_are_summed_and_get_no_gradient_outside(rows: Sequences) -> None:
    policy, reference = out(POLICY), out(REFERENCE)
    scores = compare(policy, reference, rows, clamp=(-1.0, 1.5))
    assert scores.token_logratio is not None
    assert scores.token_logratio.tolist() == [0.5, 0.0, -1.0, 0.0, 1.0, 1.5]
    assert scores.logratio.tolist() == [0.5, -1.0, 2.5]
    assert scores.logp.tolist() == [-1.0, -6.5, -0.375], "log-probabilities are those of the model"
    grad = torch.autograd.grad(scores.logratio @ torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), policy.logp)
    assert grad[0].tolist() == [1, 10, 0, 10, 100, 0]


def test_values_are_handed_on(rows: Sequences) -> None:
    value = torch.arange(6.0)
    assert compare(out(POLICY)._replace(value=value), out(REFERENCE), rows).value is value
