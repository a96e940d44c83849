"""Which parts of a model are gathered one at a time, in every family; and skeletons that become another model's."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from halos_pl.parallel import adopt, decoder_layers, layout
from halos_pl.parallel.sharding import _apart

FAMILIES = (
    *(
        "bloom",
        "cohere",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
    ),
    *("gptj", "granite", "jamba", "llama", "mamba", "mistral", "mixtral", "mpt", "olmo", "olmoe", "opt", "phi", "phi3"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "rwkv", "smollm3", "stablelm", "starcoder2"),
)
OTHER = {  # type → units, where their number is not config.num_hidden_layers
    "blenderbot": 24,  # of the decoder; the configuration's is the encoder's
    "blt": 59,  # four stacks; the configuration has no number for all
    "gemma3": 12 + 26,  # with the tower of images
    "git": 12 + 6,
    "got_ocr2": 12 + 24,
    "hrm_text": 32,  # each is run four times
    "longcat_flash": 28,  # of two halves each
    "moss_transcribe_diarize": 24 + 28,
    "phi4_multimodal": 32 + 27 + 24,
    "xlm": 12 + 12,  # attentions and perceptrons stand in lists of their own
}


def skeleton(kind: str, **options: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options))


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_layer_of_a_family_is_found(kind: str) -> None:
    count = {"num_layers": 4, "attention_types": [[["global", "local"], 2]]} if kind == "gpt_neo" else {}
    layers = decoder_layers(skeleton(kind, pad_token_id=0, **(count or {"num_hidden_layers": 4})))
    assert len(layers) == 4
    assert all("Layer" in type(layer).__name__ or "Block" in type(layer).__name__ for layer in layers)


@pytest.mark.slow
def test_every_layer_of_all_families_is_found() -> None:
    """Those whose default configuration cannot be built are counted, too: a wrong one must not hide among them."""
    wrong, unbuilt, found = {}, {}, 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            model = skeleton(kind)
        except Exception as error:  # of the family's own defaults, or a package that is not here
            unbuilt[kind] = type(error).__name__
            continue
        found += 1
        layers = decoder_layers(model)
        if len(layers) != OTHER.get(kind, getattr(model.config.get_text_config(), "num_hidden_layers", None)):
            wrong[kind] = Counter(type(layer).__name__ for layer in layers)
        on_meta = [
            name for module in model.modules() for name, x in vars(module).items() if isinstance(x, torch.Tensor)
        ]
        assert not on_meta, f"{kind}: {on_meta} are neither weights nor buffers: no other rank would get them"
    assert not wrong
    assert found > 150, unbuilt


class Layer(nn.Module):
    def __init__(self, inner: nn.Linear | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2) if inner is None else inner


def test_lists_of_bare_projections_and_of_empty_modules_are_no_layers() -> None:
    model = nn.Module()
    model.up, model.none = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Identity()])
    model.body = nn.Module()
    model.body.layers = nn.ModuleList([Layer(), Layer()])
    assert decoder_layers(model) == list(model.body.layers)


def test_layers_that_share_a_weight_are_left_to_the_root() -> None:
    model, shared = nn.Module(), nn.Linear(2, 2)
    tied, head = Layer(), nn.Linear(2, 2)
    head.weight = tied.inner.weight
    also = Layer()
    also.inner.weight = shared.weight
    model.layers, model.head = nn.ModuleList([Layer(shared), Layer(shared), Layer(), tied, also]), head
    assert _apart(decoder_layers(model), model) == [model.layers[2]]


@pytest.mark.parametrize("tied", [True, False])
def test_a_skeleton_becomes_the_other_model_s(tied: bool) -> None:
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](num_hidden_layers=1, tie_word_embeddings=tied))
    wanted = copy.deepcopy(other).bfloat16()
    if tied:  # some versions part them on the way
        wanted.lm_head.weight = wanted.model.embed_tokens.weight
    wanted.model.norm.weight = nn.Parameter(wanted.model.norm.weight.float())
    model = skeleton("llama", num_hidden_layers=1, tie_word_embeddings=not tied)
    assert layout(model) != layout(wanted)
    adopt(model, layout(wanted))
    assert layout(model) == layout(wanted)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert [*dict(model.named_buffers())] == [*dict(wanted.named_buffers())]
    assert all(p.requires_grad and p.is_meta for p in model.parameters())
