"""Adapters against peft's own model and plain transformers in float64, and what is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from halos_pl.models import (
    START,
    LoRA,
    ModelError,
    ModelSource,
    acting,
    adapt,
    enable_checkpointing,
    load_model,
    lora,
    merged,
)
from halos_pl.models.adapter import lora_layers
from halos_pl.scoring import Scorer

V = 61
TOKENS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},  # Conv1D, a tied head
    "llama": LLAMA | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "gpt_neox": LLAMA | {"model_type": "gpt_neox", "num_attention_heads": 2},  # its head ends like a layer below
}
LEAVES = {
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}
IDS = torch.arange(3, 51).reshape(3, 16)


def source(name: str, dtype: str = "float64", **options: Any) -> ModelSource:
    return ModelSource(config=TOKENS | MODELS[name], dtype=dtype, **options)


def adapted(name: str, dtype: str = "float64", lora: LoRA | None = None, *, stir: bool = True) -> PreTrainedModel:
    """With adapters that do something, unless told otherwise."""
    where = source(name, dtype)
    lm = load_model(where)
    adapt(lm, lora or LoRA(r=2, alpha=5), where)
    if stir:
        stir_adapters(lm)
    return lm.eval()


def stir_adapters(lm: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)


def by_peft(name: str, **options: Any) -> Any:
    """The same model under peft's own wrapper, with the same adapters: the truth."""
    kind = {"target_modules": sorted(LEAVES[name]), "r": 2, "lora_alpha": 5} | options
    wrapped = peft.get_peft_model(load_model(source(name)), peft.LoraConfig(**kind), autocast_adapter_dtype=False)
    stir_adapters(wrapped)
    return wrapped.eval()


def logps(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])


# ---------------------------------------------------------------------------------------------- what is adapted


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_layers_but_the_head(name: str) -> None:
    lm = adapted(name)
    assert {x.rsplit(".", 1)[-1] for x in lora_layers(lm)} == LEAVES[name]
    per_layer = {"gpt2": 4, "llama": 7, "gpt_neox": 4}[name]
    assert len(lora_layers(lm)) == 2 * per_layer
    assert set(lm.peft_config["default"].target_modules) == LEAVES[name], "short names, as other programs know them"
    trained = {n for n, p in lm.named_parameters() if p.requires_grad}
    assert trained == {f"{x}.lora_{part}.default.weight" for x in lora_layers(lm) for part in "AB"}
    assert type(lm.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize(
    ("targets", "count"), [(["q_proj"], 2), (["q_proj", "v_proj"], 4), (["layers.1.self_attn.q_proj"], 1)]
)
def test_some_layers(targets: list[str], count: int) -> None:
    assert len(lora_layers(adapted("llama", lora=LoRA(r=1, target_modules=targets)))) == count


def test_a_name_that_the_head_shares_adapts_the_layers_alone() -> None:
    """A backbone whose layers are called like the head below which they stand."""
    where = source("llama")
    lm = load_model(where)
    lm.model.layers[0].self_attn.lm_head = torch.nn.Linear(16, 16, dtype=torch.float64)
    adapt(lm, LoRA(r=1, target_modules=["lm_head"]), where)
    assert list(lora_layers(lm)) == ["model.layers.0.self_attn.lm_head"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_start_is_the_base_to_the_last_bit(name: str, dtype: str) -> None:
    lm = adapted(name, dtype, stir=False)
    assert torch.equal(lm(IDS).logits, load_model(source(name, dtype)).eval()(IDS).logits)
    kinds = {p.dtype for p in lm.parameters() if p.requires_grad}
    assert kinds == {torch.float64 if dtype == "float64" else torch.float32}, "no update below 1/256 is lost"


def test_a_seed_gives_the_same_adapters_and_leaves_the_others_alone() -> None:
    def drawn(seed: int) -> Tensor:
        where = source("llama", seed=seed)
        lm = load_model(replace(where, seed=0))
        adapt(lm, LoRA(), where)
        layer = next(iter(lora_layers(lm).values()))
        assert not layer.lora_B["default"].weight.any()
        assert layer.lora_A["default"].weight.shape == (16, 16)
        return layer.lora_A["default"].weight

    state = torch.random.get_rng_state()
    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))
    assert torch.equal(torch.random.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------- the truth


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_peft_over_the_models_own_logits(name: str, checkpointing: bool) -> None:
    truth, lm = by_peft(name), adapted(name)
    if checkpointing:
        enable_checkpointing(lm)
        lm.train()
    weights = torch.linspace(-1, 2, IDS[:, 1:].numel(), dtype=torch.float64)
    (logps(truth).flatten() @ weights).backward()
    rows = rows_of(IDS)
    ours = Scorer(lm)(rows).logp
    torch.testing.assert_close(ours, logps(truth).detach().flatten(), atol=1e-10, rtol=0)
    (ours @ weights).backward()
    grads = {n.removeprefix("base_model.model."): p.grad for n, p in truth.named_parameters() if p.grad is not None}
    assert len(grads) == 2 * len(lora_layers(lm))
    mine = {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}
    torch.testing.assert_close(mine, grads, atol=1e-9, rtol=1e-9)
    assert min(x.abs().max().item() for x in grads.values()) > 1e-6


def rows_of(ids: Tensor) -> Any:
    """Every token but the first is scored."""
    from halos_pl.data.collate import sequences

    return sequences([(row[:1].numpy(), row[1:].numpy()) for row in ids], pad_id=0, vocab_size=V)


def test_the_head_takes_the_frozen_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from halos_kernels import ops

    ran = []
    for operator in ("linear_logp", "linear_logp_frozen"):
        true = getattr(ops, operator)
        monkeypatch.setattr(
            ops, operator, lambda *args, true=true, operator=operator: ran.append(operator) or true(*args)
        )
    Scorer(load_model(source("llama")))(rows_of(IDS))
    Scorer(adapted("llama"))(rows_of(IDS))
    assert ran == ["linear_logp", "linear_logp_frozen"]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_are_pefts(name: str, rslora: bool, tmp_path: Path) -> None:
    lm = adapted(name, lora=LoRA(r=2, alpha=5, rslora=rslora))
    before = copy.deepcopy(lm.state_dict())
    trained = [p.requires_grad for p in lm.parameters()]
    plain = merged(lm)
    assert all(torch.equal(value, lm.state_dict()[key]) for key, value in before.items())
    assert [p.requires_grad for p in lm.parameters()] == trained
    assert not lora_layers(plain)
    theirs = by_peft(name, use_rslora=rslora).merge_and_unload()
    assert plain.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(dict(plain.state_dict()), dict(theirs.state_dict()), atol=1e-14, rtol=0)
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    assert (head.weight is embeddings.weight) == (name == "gpt2")
    plain.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    live = lm(IDS).logits
    assert (live - load_model(source(name)).eval()(IDS).logits).abs().max() > 1e-3, "adapters that do nothing"
    torch.testing.assert_close(back(IDS).logits, live, atol=1e-6, rtol=0)  # Llama's norms round to float32


def test_merged_by_hand() -> None:
    """W + (alpha / r) B A, and alpha / sqrt(r) where asked for; GPT-2 keeps W transposed."""
    for name, where in (("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")):
        for rslora, scale in ((False, 5 / 2), (True, 5 / math.sqrt(2))):
            lm = adapted(name, lora=LoRA(r=2, alpha=5, rslora=rslora))
            state = lm.state_dict()
            change = scale * state[f"{where}.lora_B.default.weight"] @ state[f"{where}.lora_A.default.weight"]
            truth = state[f"{where}.base_layer.weight"] + (change.T if name == "gpt2" else change)
            torch.testing.assert_close(merged(lm).state_dict()[f"{where}.weight"], truth, atol=1e-15, rtol=0)


def test_merged_from_whole_weights_of_a_sharded_model() -> None:
    """What an adapted model holds is not asked for: its weights may be in pieces."""
    lm = adapted("gpt2")
    whole, truth = copy.deepcopy(lm.state_dict()), copy.deepcopy(merged(lm).state_dict())
    with torch.no_grad():
        for p in lm.parameters():
            p.zero_()
    assert all(torch.equal(value, truth[key]) for key, value in merged(lm, whole).state_dict().items())


def test_a_merged_bfloat16_model_is_rounded_once() -> None:
    lm = adapted("llama", "bfloat16")
    name = "model.layers.1.mlp.down_proj"
    state = {key: value.double() for key, value in lm.state_dict().items()}
    change = 2.5 * state[f"{name}.lora_B.default.weight"] @ state[f"{name}.lora_A.default.weight"]
    got = merged(lm).state_dict()[f"{name}.weight"]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), state[f"{name}.base_layer.weight"] + change, atol=1e-6, rtol=2**-8)


# ---------------------------------------------------------------------------------------------- adapters off


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_adapters_the_model_is_the_base_to_the_last_bit(dtype: str) -> None:
    lm = adapted("llama", dtype)
    trained = [p.requires_grad for p in lm.parameters()]
    live, base = lm(IDS).logits, load_model(source("llama", dtype)).eval()(IDS).logits
    with acting(lm, None):
        assert torch.equal(lm(IDS).logits, base)
        assert [p.requires_grad for p in lm.parameters()] == trained, "who shards them is not told of changes"
    assert torch.equal(lm(IDS).logits, live)
    assert not torch.equal(live, base)


def test_an_error_within_leaves_the_adapters_on() -> None:
    lm = adapted("llama")
    live = lm(IDS).logits
    with pytest.raises(KeyError), acting(lm, None):
        raise KeyError
    assert torch.equal(lm(IDS).logits, live)


def test_a_peft_that_switches_in_another_way_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that is the policy itself would teach nothing, silently."""
    lm = adapted("llama")
    kind = type(next(iter(lora_layers(lm).values())))
    with pytest.raises(RuntimeError, match="not known here"), acting(lm, START):  # there is none
        pass
    monkeypatch.setattr(kind, "active_adapters", property(lambda self: ["other"]))
    with pytest.raises(RuntimeError, match="not known here"), acting(lm, "default"):
        pass
    monkeypatch.undo()
    monkeypatch.setattr(kind, "disable_adapters", property(lambda self: False))
    with pytest.raises(RuntimeError, match="not known here"), acting(lm, None):
        pass


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "target", "says"),
    [
        ("llama", "lm_head", "no adapter on the output head 'lm_head': log-probabilities are computed from its plain"),
        ("gpt2", "lm_head", "no adapter on the output head 'lm_head'"),
        ("llama", "embed_tokens", "no adapter on the embeddings 'model.embed_tokens': they are a table"),
        ("gpt2", "wte", "no adapter on the embeddings 'transformer.wte'"),
        ("llama", "q_porj", "LlamaForCausalLM has no linear layer 'q_porj'; did you mean 'q_proj'?; it has down_proj"),
        ("llama", "mlp", "has no linear layer 'mlp'"),
        ("llama", "norm", "has no linear layer 'norm'"),
    ],
)
def test_targets_that_cannot_be(name: str, target: str, says: str) -> None:
    where = source(name)
    known = "c_attn" if name == "gpt2" else "q_proj"
    with pytest.raises(ModelError) as error:
        adapt(load_model(where), LoRA(target_modules=[known, target]), where)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"r": 0}, "lora.r must be at least 1, got 0"),
        ({"alpha": 0.0}, "lora.alpha must be positive, got 0"),
        ({"alpha": math.nan}, "lora.alpha must be positive, got nan"),
        ({"alpha": math.inf}, "lora.alpha must be positive, got inf"),
        ({"dropout": 1.0}, r"lora.dropout must be in \[0, 1\), got 1"),
        ({"dropout": -0.1}, r"lora.dropout must be in \[0, 1\), got -0.1"),
        ({"target_modules": []}, "lora.target_modules names no layer"),
        ({"quantize": "2bit"}, "lora.quantize takes none, 4bit, 8bit, got '2bit'"),
        ({"adapter": "x", "r": 4}, "lora.adapter brings its own r: leave --model.lora.r out"),
        ({"adapter": "x", "rslora": True}, "lora.adapter brings its own rslora"),
        ({"adapter": "x", "target_modules": ["q_proj"]}, "lora.adapter brings its own target_modules"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LoRA(**values)


def test_what_it_comes_to_in_words() -> None:
    assert str(LoRA()) == "LoRA(r=16, alpha=32)"
    assert str(LoRA(r=4, alpha=3.5, dropout=0.1)) == "LoRA(r=4, alpha=3.5, dropout=0.1)"
    assert str(LoRA(adapter="a/b")) == "LoRA(adapter='a/b')"


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"--model.lora needs peft: pip install 'halos-pl\[lora\]'"):
        LoRA().check(source("llama"))


def test_quantized_weights_need_cuda_bitsandbytes_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    named = ModelSource("some/model")
    with pytest.raises(ModelError, match=r"quantizes pretrained weights: name them with --model\.policy"):
        LoRA(quantize="4bit").check(source("llama"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="quantize 8bit needs a CUDA device, and there is none here"):
        LoRA(quantize="8bit").check(named)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lora, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(ModelError, match="quantize 4bit needs bitsandbytes: pip install bitsandbytes"):
        LoRA(quantize="4bit").check(named)


def test_nothing_is_merged_into_quantized_weights() -> None:
    lm = adapted("llama")
    lm.quantization_method = "bitsandbytes"
    with pytest.raises(ModelError, match="not merged into quantized weights"):
        merged(lm)
