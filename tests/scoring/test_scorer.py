"""Token log-probabilities against the logits that transformers itself computes, for heads of every kind."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from halos_pl.batch import Sequences
from halos_pl.data.collate import sequences
from halos_pl.models import ModelSource, backbone, find_head, load_model, verify_head
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


# -------------------------------------------------------------------------------------------------- value head


@pytest.mark.parametrize("name", ["gpt2", "llama, tied", "gpt_neox", "phi"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_value_head_starts_at_zero_in_the_dtype_of_the_log_probabilities(name: str, dtype: str) -> None:
    rows = make_rows()
    scorer = Scorer(build(name, dtype), value_head=True)
    out = scorer(rows)
    assert out.value is not None
    assert out.value.shape == out.logp.shape == (rows.num_scored,)
    assert out.value.dtype == out.logp.dtype
    assert (out.value == 0).all()
    assert out.value.requires_grad
    assert {p.dtype for p in scorer.parameters()} == {getattr(torch, dtype)}, "an optimizer sees one dtype"
    assert torch.equal(out.logp, Scorer(scorer.lm)(rows).logp)


def test_values_are_of_the_states_that_predict_a_token() -> None:
    lm = build("gpt2")
    scorer = Scorer(lm, value_head=True)
    assert scorer.value_head is not None
    torch.nn.init.normal_(scorer.value_head.weight, generator=torch.Generator().manual_seed(2))
    torch.nn.init.constant_(scorer.value_head.bias, 0.25)
    truth = []
    for prompt, completion in make_tokens():
        states = lm(torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states[-1][0]
        truth.append(states[len(prompt) - 1 : -1] @ scorer.value_head.weight[0] + 0.25)
    for options in ({}, {"length_groups": 2}, {"pad_to_multiple_of": 16}):
        value = scorer(make_rows(**options)).value
        torch.testing.assert_close(value, torch.cat(truth), atol=1e-10, rtol=0)
    assert torch.cat(truth).std() > 0.3


def test_a_loss_of_values_trains_head_and_backbone() -> None:
    scorer, rows = Scorer(build("gpt2"), value_head=True), make_rows()
    head = scorer.value_head
    assert head is not None
    optimizer = torch.optim.SGD(scorer.parameters(), lr=0.05)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = (scorer(rows).value - 1).square().mean()
        loss.backward()
        losses.append(loss.item())
        assert head.weight.grad is not None
        assert head.bias.grad is not None
        assert head.weight.grad.abs().max() > 0
        assert head.bias.grad.abs().max() > 0
        into_the_model = max(p.grad.abs().max() for p in backbone(scorer.lm).parameters() if p.grad is not None)
        assert (into_the_model > 0) == (step > 0), "a weight of 0 hands no gradient on, in the first step only"
        optimizer.step()
    assert losses[0] == 1 > losses[1] > losses[2]


def test_the_value_head_is_not_exported(tmp_path: Path) -> None:
    lm = build("llama")
    before = set(lm.state_dict())
    scorer = Scorer(lm, value_head=True)
    assert set(scorer.state_dict()) == {f"lm.{x}" for x in before} | {"value_head.weight", "value_head.bias"}
    scorer.lm.save_pretrained(tmp_path)
    _, info = type(lm).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert set(lm.state_dict()) == before


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
def test_both_models_with_a_value_head(grad: bool, entropy: bool) -> None:
    policy, reference, rows = Scorer(build("gpt2"), value_head=True), Scorer(build("phi")), make_rows()
    assert policy.value_head is not None
    torch.nn.init.constant_(policy.value_head.bias, 0.5)
    with torch.set_grad_enabled(grad):
        ours, theirs = score_both(policy, reference, rows, entropy=entropy)
    assert ours.value is not None
    assert theirs.value is None
    assert (ours.value == 0.5).all()
    assert (ours.entropy is not None) == entropy
    assert ours.logp.requires_grad == ours.value.requires_grad == grad
    assert not theirs.logp.requires_grad
    assert torch.equal(ours.logp, policy(rows).logp)
    assert torch.equal(theirs.logp, reference(rows).logp)
    assert Scorer(build("gpt2"))(rows).value is None
