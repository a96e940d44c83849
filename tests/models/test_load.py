"""Where a model comes from, and what is said where it cannot come."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedModel

from halos_pl.models import ModelError, ModelSource, enable_checkpointing, load_model

SMALL = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = SMALL | {"model_type": "llama", "intermediate_size": 24}
IDS = torch.arange(3, 30)[None]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "tiny"))


def weights(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# -------------------------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_pretrained_weights_in_the_dtype_asked_for(dtype: str, tiny_model: Path) -> None:
    model = load_model(ModelSource(str(tiny_model), dtype=dtype))
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    assert all(module.training for module in model.modules())
    stored = load_file(tiny_model / "model.safetensors")
    assert torch.equal(model.transformer.wte.weight, stored["transformer.wte.weight"].to(model.dtype))


def test_a_configuration_as_mapping_file_and_folder(tmp_path: Path) -> None:
    LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"}).save_pretrained(tmp_path)
    sources: list[Any] = [CONFIG, str(tmp_path / "config.json"), str(tmp_path)]
    models = [load_model(ModelSource(config=source, seed=5)) for source in sources]
    assert all(torch.equal(weights(models[0]), weights(model)) for model in models[1:])
    assert "model_type" in CONFIG, "the user's mapping is left as it is"


def test_a_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    load_model(ModelSource("~/tiny"))
    for config in ("~/tiny", "~/tiny/config.json"):
        assert ModelSource(config=config).vocab_size == 260


def test_vocabulary_and_positions() -> None:
    source = ModelSource(config=CONFIG | {"max_position_embeddings": 77})
    assert (source.vocab_size, source.max_positions) == (61, 77)
    gpt2 = {"model_type": "gpt2", "n_positions": 33}
    assert ModelSource(config=gpt2).max_positions == 33
    assert ModelSource(config={"model_type": "bloom"}).max_positions is None


def test_random_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(load_model(ModelSource(config=CONFIG, seed=7)))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    torch.manual_seed(2)
    assert torch.equal(weights(load_model(ModelSource(config=CONFIG, seed=7))), first)
    assert not torch.equal(weights(load_model(ModelSource(config=CONFIG, seed=8))), first)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG | {"attention_dropout": 0.5},  # a float that the attention keeps
        {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 61},  # layers, on by default
        SMALL | {"model_type": "opt", "layerdrop": 0.5, "ffn_dim": 24, "word_embed_proj_dim": 16},
        SMALL | {"model_type": "falcon", "hidden_dropout": 0.5, "attention_dropout": 0.5},  # read off the config
    ],
    ids=lambda config: config["model_type"],
)
def test_dropout_is_off_unless_asked_for_and_the_exported_config_keeps_it(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | config
    quiet, noisy = (load_model(ModelSource(config=config, dropout=dropout)) for dropout in (False, True))
    torch.manual_seed(0)
    assert quiet.training
    assert all(torch.equal(quiet(IDS).logits, quiet(IDS).logits) for _ in range(4))
    assert not all(torch.equal(noisy(IDS).logits, noisy(IDS).logits) for _ in range(4))
    for name, model in {"quiet": quiet, "noisy": noisy}.items():
        model.save_pretrained(tmp_path / name)
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("quiet", "noisy")]
    assert saved[0] == saved[1]
    assert any(value for name, value in saved[0].items() if "drop" in name)


def test_checkpointing_recomputes_in_the_backward_pass(tiny_model: Path) -> None:
    model = load_model(ModelSource(str(tiny_model)))
    enable_checkpointing(model)
    calls: list[int] = []
    model.transformer.h[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    model(IDS).logits.sum().backward()
    assert len(calls) == 2


# -------------------------------------------------------------------------------------------------- what does not


@pytest.mark.parametrize("names", [{}, {"name": "a", "config": "b"}])
def test_exactly_one_of_policy_and_config(names: dict[str, str]) -> None:
    with pytest.raises(ModelError, match=r"exactly one of `--model\.policy .*` .* `--model\.config"):
        ModelSource(**names)


def test_an_unknown_dtype() -> None:
    with pytest.raises(ModelError, match="dtype must be one of float32, bfloat16, float64, got 'fp16'"):
        ModelSource("x", dtype="fp16")


def test_a_missing_folder_names_the_nearest(folder: Path) -> None:
    for source in (ModelSource(f"{folder}y"), ModelSource(config=f"{folder}y")):
        with pytest.raises(ModelError, match=rf"no model folder '{folder}y'; nearest: {folder}$"):
            _ = source.pretrained_config
    with pytest.raises(ModelError, match=r"no model folder '/no/such/place'$"):
        _ = ModelSource("/no/such/place").pretrained_config


def test_a_folder_without_a_config_says_what_it_holds(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"not a model folder: it has no config\.json \(it holds .*model\.safetensors"):
        _ = ModelSource(str(folder)).pretrained_config
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"\(it holds nothing\)"):
        _ = ModelSource(str(empty)).pretrained_config


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "not a valid JSON"), ("{}", "model_type"), ('{"model_type": "lama"}', "`lama`")]
)
def test_a_config_that_cannot_be_read(text: str, reason: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"{folder}: its config\.json cannot be read: .*{reason}"):
        _ = ModelSource(str(folder)).pretrained_config


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "lama"}, "model_type is 'lama', which transformers does not know; nearest: llama"),
        ({}, "model_type is None, .*; give one, such as llama"),
        (CONFIG | {"hidden_size": "x"}, "not a configuration of a llama model: "),
        ("nowhere.json", "cannot read .*nowhere.json: No such file"),
        ("broken.json", "broken.json is not JSON"),
        ("list.json", "list.json must hold one JSON object, got list"),
    ],
    ids=str,
)
def test_a_bare_configuration_that_is_none(
    config: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[]")
    with pytest.raises(ModelError, match=rf"(?s)--model\.config: {reason}"):
        _ = ModelSource(config=config).pretrained_config


def test_a_model_that_is_not_causal() -> None:
    with pytest.raises(ModelError, match=r"model\.config: cannot be loaded as a causal language model"):
        load_model(ModelSource(config={"model_type": "t5"}))


def _drop_a_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["transformer.ln_f.bias"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_drop_a_weight, r"the weights lack transformer\.ln_f\.bias \(1 in all\)"),
        (_widen, r"wte\.weight is \[260, 32\] in the weights, but config\.json asks for \[300, 32\] \(1 such"),
        (_cut, "cannot be loaded as a causal language model: Error while deserializing"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "cannot be loaded as a causal language model: .*no file",
        ),
    ],
    ids=["missing", "other shape", "cut file", "no file"],
)
def test_weights_that_do_not_belong_to_the_config(spoil: Callable[[Path], Any], reason: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=rf"^{folder}: .*{reason}"):
        load_model(ModelSource(str(folder)))


def test_a_mistyped_key_of_a_configuration_is_named() -> None:
    source = ModelSource(config={"model_type": "llama", "hiden_size": 8})
    with pytest.raises(ModelError, match="LlamaConfig has no key 'hiden_size'; did you mean 'hidden_size'"):
        _ = source.pretrained_config
