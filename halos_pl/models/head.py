"""The output head of a causal language model, as the fused log-probability wants it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halos_pl.models.load import ModelError


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: softcap((hidden @ weight.T + bias) · scale).

    The weight is looked up at call time, inside the root's forward: a sharded or re-tied weight must not be kept.
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part of the model that ends at the last hidden state."""
    base = model.base_model
    if base is model:
        raise ModelError(
            f"{type(model).__name__} has no separate backbone ({model.base_model_prefix!r}) below its head"
        )
    return base


def find_head(model: PreTrainedModel) -> Head:
    """The head of the model with the logit scale and soft cap that its configuration names.

    Raises:
        ModelError: the output embedding is not a plain linear layer.
    """
    linear = model.get_output_embeddings()
    plain = (
        isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward and "forward" not in vars(linear)
    )
    if not plain:
        raise ModelError(
            f"{type(model).__name__} has no plain linear output head (found {type(linear).__module__}."
            f"{type(linear).__name__}); its log-probabilities cannot be computed without logits. "
            "If that is an adapter, leave the output layer out of its target modules, or merge it first"
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return Head(linear, scale, None if softcap is None else float(softcap))


@torch.no_grad()
def verify_head(model: PreTrainedModel, head: Head, *, atol: float = 1e-3) -> None:
    """Compare the head with the model's own logits on four tokens, so that no architecture is scored wrongly.

    Hidden states are enlarged until logits reach 10, so that random weights too show a soft cap that is not known here.

    Args:
        model: in any mode; left as it is.
        head: of this model.
        atol: of the log-probabilities, nats. 16-bit weights, whose logits transformers rounds, are given 1/64 of the
            largest logit.

    Raises:
        ModelError: the model's logits are not those of `Head`, or a token sees what lies to its right (rows are padded
            there, without a mask): its log-probabilities would be wrong.
    """
    training, weight = model.training, head.weight.float()
    ids = torch.arange(4, device=weight.device)[None] % weight.shape[0]
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    model.eval()
    try:
        hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        again = backbone(model)(input_ids=longer, use_cache=False).last_hidden_state[:, :-1]
        largest = (hidden.float() @ weight.T * head.scale).abs().max().item()
        gain = max(1.0, 10 / max(largest, 1e-6))
        with head.linear.register_forward_pre_hook(lambda module, args: (args[0] * gain,)):
            own = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    finally:
        model.train(training)
    if not own.isfinite().all():
        raise ModelError(f"{type(model).__name__}: the weights give logits that are not finite")
    if not torch.allclose(hidden.float(), again.float(), atol=1e-2 * hidden.float().abs().max().item(), rtol=0):
        raise ModelError(f"{type(model).__name__} is not causal: a token's hidden state depends on what follows it")
    logits = (hidden * gain).float() @ weight.T
    if head.bias is not None:
        logits = logits + head.bias.float()
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    ours = logits.log_softmax(-1)
    tolerance = atol if head.weight.dtype in (torch.float32, torch.float64) else logits.abs().max().item() / 64
    if own.shape != ours.shape or not torch.allclose(own, ours, atol=tolerance, rtol=1e-3):
        raise ModelError(
            f"{type(model).__name__} computes its logits in a way that is not known here "
            "(not bias, logit scale or soft cap alone); training on wrong log-probabilities is refused"
        )
