"""Token log-probabilities against the logits that transformers itself computes, for heads of every kind."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from halos_pl.batch import Sequences
from halos_pl.data.collate import sequences
from halos_pl.models import ModelSource, find_head, load_model, verify_head
from halos_pl.scoring import Scorer, score_both

V = 61
ROWS = [(2, 5), (7, 1), (1, 9), (4, 4)]  # tokens of prompt and completion
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SMALL | {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "qwen2": LLAMA,
    "gpt2": {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt2, untied": {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False},
    "gpt_neox": SMALL | {"intermediate_size": 24, "max_position_embeddings": 64},
    "opt": SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 64},
    "gemma2": LLAMA
    | {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": LLAMA | {"logit_scale": 0.37},
    "granite": LLAMA | {"logits_scaling": 2.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.3},
    "phi": LLAMA,  # its head has a bias
    "nanochat": LLAMA | {"final_logit_softcapping": 3.0},
}


ROUNDS = ("gemma2", "cohere")
"""Models whose norms round to float32 whatever the dtype: a row alone and a row beside others differ by that."""


def build(name: str, dtype: str = "float64") -> PreTrainedModel:
    """Random weights, large enough that scales and caps of the logits matter."""
    config = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | ARCHITECTURES[name]
    lm = load_model(ModelSource(config={"model_type": name.split(",")[0], **config}, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return lm


def make_tokens() -> list[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(3, V, (x,), generator=generator).numpy(), torch.randint(3, V, (y,), generator=generator).numpy())
        for x, y in ROWS
    ]


def make_rows(**options: int) -> Sequences:
    return sequences(make_tokens(), pad_id=0, vocab_size=V, **options)


def own_distributions(lm: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """From the model's own logits, a row at a time, without padding: [n, V] log-probabilities and [n] scored tokens."""
    for prompt, completion in make_tokens():
        ids = torch.tensor([*prompt, *completion])
        yield lm(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1), ids[len(prompt) :]


def own_logps(lm: PreTrainedModel) -> Tensor:
    return torch.cat([logps[torch.arange(len(ids)), ids] for logps, ids in own_distributions(lm)])


def parameters_grad(lm: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    lm.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_and_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    lm, rows = build(name), make_rows()
    verify_head(lm, find_head(lm))
    weights = torch.linspace(-1, 2, rows.num_scored, dtype=torch.float64)
    truth, ours = own_logps(lm), Scorer(lm)(rows).logp
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, truth, atol=1e-10, rtol=0)
    assert truth.std() > 0.3, "logits so flat that a scale would not show"
    theirs, mine = parameters_grad(lm, truth @ weights), parameters_grad(lm, ours @ weights)
    assert theirs.keys() == mine.keys()
    tolerance = 1e-6 if name in ROUNDS else 1e-9
    torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_float32(name: str) -> None:
    lm, rows = build(name, "float32"), make_rows()
    torch.testing.assert_close(Scorer(lm)(rows).logp, own_logps(lm), atol=2e-5, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter")
@pytest.mark.parametrize("name", ["llama, tied", "gemma2", "phi", "cohere"])
def test_triton_scores_and_trains_as_eager_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, rows = build(name, "float32"), make_rows()
    weights = torch.linspace(-1, 2, rows.num_scored)
    runs = []
    for impl in ("eager", "triton"):
        monkeypatch.setenv("HALOS_IMPL", impl)
        policy, reference = score_both(Scorer(lm), Scorer(lm), rows)
        with torch.no_grad():
            both = score_both(Scorer(lm), Scorer(lm), rows)
        assert all(torch.equal(x.logp, policy.logp) for x in (reference, *both)), "log-ratios of a model with itself"
        runs.append((policy.logp.detach(), parameters_grad(lm, policy.logp @ weights)))
    torch.testing.assert_close(*runs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2"])
def test_padding_changes_nothing(name: str) -> None:
    scorer = Scorer(build(name))
    with torch.no_grad():
        plain = scorer(make_rows()).logp
        for options in ({"pad_to_multiple_of": 32}, {"length_groups": 2}, {"length_groups": 9}):
            padded = scorer(make_rows(**options)).logp
            torch.testing.assert_close(padded, plain, atol=1e-5 if name in ROUNDS else 1e-11, rtol=0)


def test_entropy_of_the_next_token() -> None:
    lm, rows = build("cohere"), make_rows()
    truth = torch.cat([-(logps.exp() * logps).sum(-1) for logps, _ in own_distributions(lm)])
    entropy = Scorer(lm)(rows, entropy=True).entropy
    assert entropy is not None
    torch.testing.assert_close(entropy, truth, atol=1e-10, rtol=0)
    assert Scorer(lm)(rows).entropy is None


def test_only_predictors_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("halos_pl.scoring.scorer")
    real, seen = module.linear_logp, []

    def spy(hidden: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(tuple(hidden.shape))
        return real(hidden, *args, **options)

    monkeypatch.setattr(module, "linear_logp", spy)
    lm, rows = build("llama"), make_rows()
    lm.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the head's own forward was called"))
    Scorer(lm)(rows)
    assert seen == [(sum(completion for _, completion in ROWS), 16)]


def test_no_logits_of_tokens_times_vocabulary_exist(allocations: Any) -> None:
    """V is far above everything else here, so that logits would be the largest tensor by far."""
    vocabulary = 4096
    lm = load_model(ModelSource(config={"model_type": "llama", **LLAMA, "vocab_size": vocabulary}))
    rows = sequences([(torch.arange(9).numpy(), torch.arange(40).numpy())] * 2, pad_id=0, vocab_size=vocabulary)
    with allocations() as seen:
        Scorer(lm)(rows).logp.sum().backward()
    scored = vocabulary * rows.num_scored
    assert seen.largest == vocabulary * 16 < scored, "the gradient of the embedding is the largest that must exist"
    assert (rows.num_scored, 16) in seen.shapes, "the measure sees into the operator"
    with allocations() as seen:
        lm(rows.blocks[0])
    assert seen.largest >= scored, "the measure sees logits where they exist"


def test_both_heads_in_one_call_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("halos_pl.scoring.scorer")
    real, calls = module.linear_logp_multi, []

    def spy(heads: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(heads))
        return real(heads, *args, **options)

    monkeypatch.setattr(module, "linear_logp_multi", spy)
    policy, reference, rows = Scorer(build("phi")), Scorer(build("gemma2")), make_rows()
    with torch.no_grad():
        both = score_both(policy, reference, rows, entropy=True)
        for out, scorer in zip(both, (policy, reference), strict=True):
            alone = scorer(rows, entropy=True)
            assert all(map(torch.equal, out[:2], alone[:2]))
    assert calls == [2]
    with_gradient, without = score_both(policy, reference, rows)
    assert calls == [2]
    assert with_gradient.logp.requires_grad
    assert not without.logp.requires_grad
    assert torch.equal(with_gradient.logp, both[0].logp)
    assert torch.equal(without.logp, both[1].logp)
