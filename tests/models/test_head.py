"""The head that scores: found with its scale and cap, and refused where the model's own logits say otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from halos_pl.models import ModelError, ModelSource, backbone, find_head, load_model, verify_head

V = 61
LLAMA = {
    "vocab_size": V,
    "pad_token_id": 0,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def build(kind: str = "llama", dtype: str = "float32", **config: Any) -> PreTrainedModel:
    """Small random weights, as a fresh configuration gives them."""
    return load_model(ModelSource(config={"model_type": kind, **LLAMA, **config}, dtype=dtype))


class Unknown(LlamaForCausalLM):
    """Changes its logits in a way that no configuration names."""

    change: Callable[[Tensor], Tensor]

    def forward(self, *args: Any, **options: Any) -> Any:
        out = super().forward(*args, **options)
        out.logits = self.change(out.logits)
        return out


@pytest.mark.parametrize(
    ("kind", "config", "scale", "softcap", "has_bias"),
    [
        ("llama", {}, 1.0, None, False),
        ("cohere", {"logit_scale": 0.0625}, 0.0625, None, False),
        ("granite", {"logits_scaling": 8.0}, 0.125, None, False),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0}, 1.0, 30.0, False),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": None}, 1.0, None, False),
        ("phi", {}, 1.0, None, True),
    ],
)
def test_scale_cap_and_bias(kind: str, config: dict[str, Any], scale: float, softcap: Any, has_bias: bool) -> None:
    lm = build(kind, **config)
    head = find_head(lm)
    assert (head.scale, head.softcap, head.bias is not None) == (scale, softcap, has_bias)
    assert head.weight is lm.get_output_embeddings().weight
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        verify_head(lm.to(dtype), find_head(lm))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 0.5,
        lambda x: 30 * torch.tanh(x / 30),
        lambda x: x + torch.linspace(0, 1, V, dtype=x.dtype),
        lambda x: x.index_fill(-1, torch.tensor([7]), torch.finfo(x.dtype).min),
        lambda x: x[..., :-1],
    ],
    ids=["scale", "soft cap", "bias", "forbidden token", "fewer tokens"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_change_of_the_logits_is_refused(change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    lm = Unknown(build().config).to(dtype)
    lm.change = lambda x: x
    verify_head(lm, find_head(lm))
    lm.change = change
    with pytest.raises(ModelError, match="Unknown computes its logits in a way that is not known here"):
        verify_head(lm, find_head(lm))


def test_a_setting_that_the_model_ignores_is_refused() -> None:
    lm = build()
    lm.config.logit_scale = 0.5  # Llama knows no such thing
    with pytest.raises(ModelError, match="LlamaForCausalLM computes its logits"):
        verify_head(lm, find_head(lm))


@pytest.mark.parametrize("training", [True, False])
def test_verification_leaves_the_model_as_it_was(training: bool) -> None:
    lm = build().train(training)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    verify_head(lm, find_head(lm))
    assert all(module.training is training for module in lm.modules())
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())
    assert all(p.grad is None for p in lm.parameters())
    ids = torch.arange(5)[None]
    logits = lm(ids).logits
    torch.testing.assert_close(find_head(lm).linear(backbone(lm)(ids).last_hidden_state), logits)


class Adapted(nn.Linear):
    """An adapter as loralib writes it: without effect at first, so that comparing logits does not show it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.0


def test_an_adapter_on_the_head_is_refused() -> None:
    lm = build()
    lm.set_output_embeddings(Adapted(16, V))
    with pytest.raises(ModelError, match=r"no plain linear output head \(found .*Adapted\).*adapter"):
        find_head(lm)
    lm = build()
    head = lm.get_output_embeddings()
    head.forward = lambda x: nn.Linear.forward(head, x)
    with pytest.raises(ModelError, match="adapter"):
        find_head(lm)


def test_what_is_not_a_linear_head_on_a_backbone_is_refused() -> None:
    lm = build()
    lm.set_output_embeddings(nn.Sequential(nn.Linear(16, V)))
    with pytest.raises(
        ModelError, match=r"no plain linear output head \(found torch.nn.modules.container.Sequential\).*adapter"
    ):
        find_head(lm)
    with pytest.raises(ModelError, match="LlamaModel has no separate backbone"):
        backbone(lm.model)
