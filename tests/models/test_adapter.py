"""Folders of adapters: peft reads what is written here, and what peft wrote is gone on with, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from halos_pl.models import START, LoRA, ModelError, ModelSource, acting, adapt, export_adapter, load_model
from halos_pl.models.adapter import lora_layers

IDS = torch.arange(3, 51).reshape(3, 16)
TARGETS = ["c_attn", "c_fc"]


def stir(model: torch.nn.Module, adapter: str = "default") -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f".{adapter}." in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def by_peft(base: Path, **options: Any) -> Any:
    kind = {"target_modules": TARGETS, "r": 2, "lora_alpha": 5, "fan_in_fan_out": True} | options
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**kind))
    stir(wrapped)
    return wrapped.eval()


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter as peft leaves it, with more rank in one layer."""
    by_peft(tiny_model, rank_pattern={"h.1.mlp.c_fc": 3}).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def go_on(base: Path, folder: Path, *, dtype: str = "float32", dropout: float = 0.0) -> PreTrainedModel:
    where, lora = ModelSource(str(base), dtype=dtype), LoRA(adapter=str(folder), dropout=dropout)
    lora.check(where)
    lm = load_model(where)
    adapt(lm, lora, where, keep_start=True)
    return lm.eval()


def logits(model: Any) -> Tensor:
    out: Tensor = model(IDS, use_cache=False).logits
    return out


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


# ---------------------------------------------------------------------------------------------- what is written


def test_peft_loads_what_is_exported(tiny_model: Path, tmp_path: Path) -> None:
    where = ModelSource(str(tiny_model))
    lm = load_model(where)
    adapt(lm, LoRA(r=3, alpha=7, rslora=True, target_modules=TARGETS), where)
    stir(lm.eval())
    export_adapter(lm, tmp_path / "run" / "adapter", str(tiny_model))
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "run" / "adapter"
    )
    assert torch.equal(logits(again.eval()), logits(lm))
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model.resolve())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["task_type"]) == (3, 7, True, "CAUSAL_LM")
    assert {x.name for x in (tmp_path / "run").rglob("*")} == {
        *("adapter", "adapter_config.json", "adapter_model.safetensors")
    }
    by_itself = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")
    assert torch.equal(logits(by_itself.eval()), logits(lm))


def test_a_newer_export_replaces_an_older_one(tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = go_on(tiny_model, folder)
    held = {key: value + 1 for key, value in lm.state_dict().items()}
    target = folder.with_name("out")
    export_adapter(lm, target, "org/base")
    export_adapter(lm, target, "org/base", state=held)
    name = "transformer.h.0.attn.c_attn"
    written = load_file(target / "adapter_model.safetensors")
    assert torch.equal(written[f"base_model.model.{name}.lora_A.weight"], held[f"{name}.lora_A.default.weight"])
    assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"

    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("halos_pl.models.adapter.save_file", full)
    with pytest.raises(OSError, match="No space"):
        export_adapter(lm, target, None)
    assert {x.name for x in target.parent.iterdir()} == {"adapter", "out"}
    assert load_file(target / "adapter_model.safetensors").keys() == written.keys()


# ---------------------------------------------------------------------------------------------- what is gone on with


def test_pefts_adapter_is_gone_on_with_and_its_start_is_kept(tiny_model: Path, folder: Path) -> None:
    lm = go_on(tiny_model, folder)
    truth = by_peft(tiny_model, rank_pattern={"h.1.mlp.c_fc": 3})
    start, base = logits(truth), logits(AutoModelForCausalLM.from_pretrained(tiny_model).eval())
    assert torch.equal(logits(lm), start)
    assert (start - base).abs().max() > 1e-2
    merged_by_peft = truth.merge_and_unload()
    with torch.no_grad():
        for name, p in lm.named_parameters():
            assert p.requires_grad == (".default." in name)
            if p.requires_grad:
                p.add_(0.1)
    assert not torch.equal(logits(lm), start)
    with acting(lm, START):
        assert torch.equal(logits(lm), start)
        torch.testing.assert_close(logits(lm), logits(merged_by_peft), atol=1e-5, rtol=0)
    with acting(lm, None):
        assert torch.equal(logits(lm), base)


def test_its_own_dropout_is_not_taken(tiny_model: Path, folder: Path) -> None:
    edit(folder, lora_dropout=0.5)
    lm = go_on(tiny_model, folder).train()
    assert torch.equal(logits(lm), logits(lm))
    lm = go_on(tiny_model, folder, dropout=0.5).train()
    assert not torch.equal(logits(lm), logits(lm))


def test_beside_bfloat16_weights_it_is_float32(tiny_model: Path, folder: Path) -> None:
    lm = go_on(tiny_model, folder, dtype="bfloat16")
    assert {p.dtype for n, p in lm.named_parameters() if "lora_" in n} == {torch.float32}
    stored = load_file(folder / "adapter_model.safetensors")
    for name, layer in lora_layers(lm).items():
        for adapter in ("default", START):
            assert torch.equal(layer.lora_A[adapter].weight, stored[f"base_model.model.{name}.lora_A.weight"])


def test_one_base_by_several_names(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    for recorded in (None, "", str(tiny_model), f"/moved/to/{tiny_model.name}", f"org/{tiny_model.name}"):
        edit(folder, base_model_name_or_path=recorded)
        go_on(tiny_model, folder)
    (tmp_path / "link").symlink_to(tiny_model)
    edit(folder, base_model_name_or_path=str(tiny_model))
    go_on(tmp_path / "link", folder)


# ---------------------------------------------------------------------------------------------- what is refused


def refused(base: Path, folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        go_on(base, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_base_by_name(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "elsewhere" / tiny_model.name))
    for recorded in ("org/other-7b", str(other)):
        edit(folder, base_model_name_or_path=recorded)
        told = refused(tiny_model, folder)
        assert f"{folder} was made for the base {recorded!r}, and the policy is '{tiny_model}'" in told
        assert "base_model_name_or_path of its adapter_config.json" in told


def test_another_base_by_shape(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = ModelSource(str(tiny_model)).pretrained_config
    for change, says in (
        ({"n_embd": 16}, "transformer.h.0.attn.c_attn has 16 inputs, the adapter 32 (8 such in all)"),
        ({"n_inner": 99}, "transformer.h.0.mlp.c_fc has 99 outputs, the adapter 128 (2 such in all)"),
        ({"n_layer": 1}, "there is no linear layer transformer.h.1.attn.c_attn (4 such in all)"),
    ):
        for key, value in change.items():
            setattr(config, key, value)
        where = ModelSource(config=config.to_dict())
        with pytest.raises(ModelError) as error:
            adapt(load_model(where), LoRA(adapter=str(folder)), where)
        assert f"the adapter {folder} is for another base than this GPT2LMHeadModel" in str(error.value)
        assert says in str(error.value)
        config = ModelSource(str(tiny_model)).pretrained_config


def test_a_pickle_is_not_opened(tiny_model: Path, folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "only adapter_model.bin, a pickle, which can run code: save it as safetensors" in refused(tiny_model, folder)
    (folder / "adapter_model.bin").unlink()
    assert f"{folder} has no weights (adapter_model.safetensors)" in refused(tiny_model, folder)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter, and only LORA is known here"),
        ({"use_dora": True}, "was made with use_dora=True, not honoured here"),
        ({"bias": "all"}, "was made with bias='all', not honoured here"),
        ({"modules_to_save": ["lm_head"]}, "was made with modules_to_save=['lm_head'], not honoured here"),
        ({"lora_bias": True}, "was made with lora_bias=True, not honoured here"),
        ({"init_lora_weights": "pissa_niter_4"}, "began as pissa_niter_4, which changes the base's weights"),
        ({"target_modules": ["c_attn"]}, "weights and configuration differ on transformer.h.0.mlp.c_fc"),
        ({"r": 5}, ".lora_A is [2, 32], but its configuration asks for [5, 32]"),
    ],
)
def test_what_would_not_be_honoured(values: dict[str, Any], says: str, tiny_model: Path, folder: Path) -> None:
    edit(folder, **values)
    assert says in refused(tiny_model, folder)


def test_an_adapter_of_the_head(tiny_model: Path, tmp_path: Path) -> None:
    by_peft(tiny_model, target_modules=["lm_head"]).save_pretrained(tmp_path / "head", save_embedding_layers=False)
    assert "no adapter on the output head 'lm_head'" in refused(tiny_model, tmp_path / "head")
    by_peft(tiny_model, target_modules=["wte"]).save_pretrained(tmp_path / "table", save_embedding_layers=False)
    assert "no adapter on the embeddings 'transformer.wte'" in refused(tiny_model, tmp_path / "table")


def test_a_folder_that_is_spoilt(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    edit_weights(folder, lambda x: {key: value for key, value in x.items() if "h.0.attn.c_attn.lora_B" not in key})
    assert "the adapter lacks a part of transformer.h.0.attn.c_attn" in refused(tiny_model, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"spoilt")
    assert "its adapter_model.safetensors cannot be read" in refused(tiny_model, folder)
    (folder / "adapter_config.json").write_text("{")
    assert "its adapter_config.json cannot be read" in refused(tiny_model, folder)
    assert "nowhere is not an adapter's folder: it has no adapter_config.json" in refused(
        tiny_model, tmp_path / "nowhere"
    )


def test_an_adapter_given_for_a_model_is_told_its_place(folder: Path, tiny_model: Path) -> None:
    with pytest.raises(ModelError) as error:
        load_model(ModelSource(str(folder)))
    assert str(error.value) == (
        f"{folder} is an adapter, not a model: "
        f"--model.policy {tiny_model} --model.lora.adapter {folder} goes on with it"
    )
