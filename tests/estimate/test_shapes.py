"""Counts are those of the real module."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from halos_pl.estimate import Shapes, read_shapes
from halos_pl.models import ModelError, ModelSource

FAMILIES = [
    {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False},
    {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 24},
    {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8},
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4},
]
SIZES = {"hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda x: f"{x['model_type']} {x.get('tie_word_embeddings', '')}")
def test_every_parameter_counts_once(family: dict[str, Any]) -> None:
    sizes = {} if family["model_type"] == "gpt2" else SIZES
    source = ModelSource(config={"vocab_size": 101, **sizes, **family})
    model = AutoModelForCausalLM.from_config(source.pretrained_config)
    found = read_shapes(source)
    assert found.numel == sum(p.numel() for p in model.parameters())
    assert len(found.layers) == 3
    assert found.llama_like == (family["model_type"] != "gpt2")
    assert all(x.linears for x in found.layers)
    assert found.tied == (model.lm_head.weight is model.get_input_embeddings().weight)


def test_by_hand(shapes: Shapes) -> None:
    assert (shapes.root.numel, [x.numel for x in shapes.layers], shapes.numel) == (168, [496, 496], 1160)
    assert (shapes.hidden, shapes.intermediate, shapes.queries, shapes.keys) == (8, 12, 8, 4)
    assert (shapes.heads, shapes.head_width, shapes.vocabulary) == (2, 4, 10)


def test_shards_are_padded(shapes: Shapes) -> None:
    """Of three ranks: q and o 3·8, k and v 2·8, gate and up 4·8, down 3·12, norms 3 and 3."""
    assert shapes.layers[0].local(3) == 2 * 24 + 2 * 16 + 2 * 32 + 36 + 6
    assert shapes.layers[0].local(1) == 496


def test_adapters_are_peft_s(config: dict[str, Any], shapes: Shapes) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_config(ModelSource(config=config).pretrained_config)
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules="all-linear"), model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 2 * shapes.layers[0].adapters(3, None).numel == trained
    assert shapes.layers[0].adapters(3, ("q_proj", "v_proj")).numel == 3 * (8 + 8) + 3 * (8 + 4)
    assert shapes.root.adapters(3, None).numel == 0


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "mixtral", "num_local_experts": 2, **SIZES}, "mixtures of experts are not estimated"),
        ({"model_type": "t5"}, "no causal language model"),
    ],
)
def test_what_is_not_known(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        read_shapes(ModelSource(config=config))
