"""The shapes of a model, unit by unit: what FSDP2 gathers at a time, counted on the meta device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halos_pl.models import ModelError, ModelSource, backbone

Size = tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together: one decoder layer, or the root (embeddings, last norm, head)."""

    parameters: tuple[Size, ...]
    linears: tuple[tuple[str, int, int], ...] = ()  # name, outputs, inputs

    @property
    def numel(self) -> int:
        return _total(self.parameters)

    def local(self, shard: int) -> int:
        """Elements of the rank that holds most: Σ ⌈rows / shard⌉ · columns, since FSDP2 splits dimension 0."""
        return _total((math.ceil(rows / shard), *rest) for rows, *rest in self.parameters)

    def adapters(self, rank: int, targets: tuple[str, ...] | None) -> Unit:
        """A [rank, inputs] and B [outputs, rank] of each target; all linear layers where none are named."""
        chosen = [x for x in self.linears if targets is None or x[0].rsplit(".", 1)[-1] in targets]
        return Unit(tuple(size for _, rows, columns in chosen for size in ((rank, columns), (rows, rank))))


@dataclass(frozen=True)
class Shapes:
    """A decoder of the Llama kind."""

    root: Unit
    layers: tuple[Unit, ...]
    hidden: int  # d
    intermediate: int  # f
    queries: int  # heads · width of a head
    keys: int  # key and value heads · width of a head
    heads: int
    vocabulary: int  # V
    tied: bool

    @property
    def numel(self) -> int:
        return self.root.numel + sum(x.numel for x in self.layers)

    @property
    def llama_like(self) -> bool:
        """Whether a layer's weights are those of grouped queries and a gated MLP: else activations are a guess."""
        expected = self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.intermediate)
        return all(abs(sum(a * b for _, a, b in x.linears) - expected) < 0.01 * expected for x in self.layers)

    @property
    def largest_layer(self) -> Unit:
        return max(self.layers, key=lambda x: x.numel)

    @property
    def head_width(self) -> int:
        return self.queries // self.heads


def read_shapes(source: ModelSource) -> Shapes:
    """Every parameter of the model, without its memory.

    Raises:
        ModelError: no such model; no stack of decoder layers; an architecture whose activations are not known here.
    """
    config = source.pretrained_config
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except (ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"{type(config).__name__}: no causal language model: {error}") from error
    return shapes_of(lm)


def shapes_of(lm: PreTrainedModel) -> Shapes:
    """As `read_shapes`, of a model that is there."""
    config, name = lm.config.get_text_config(), type(lm).__name__
    stacks = [x for x in backbone(lm).modules() if isinstance(x, nn.ModuleList) and len(x)]
    if not stacks:
        raise ModelError(f"{name}: no list of decoder layers found")
    stack = max(stacks, key=lambda x: sum(p.numel() for p in x.parameters()))
    if any(p.dim() > 2 for p in stack.parameters()) or hasattr(config, "num_experts"):
        raise ModelError(f"{name}: mixtures of experts are not estimated")
    inside = {id(p) for p in stack.parameters()}
    outside = {id(p): p for p in lm.parameters() if id(p) not in inside}
    head = lm.get_output_embeddings()
    heads, width = config.num_attention_heads, getattr(config, "head_dim", None)
    width = width or config.hidden_size // heads
    return Shapes(
        root=Unit(tuple(tuple(p.shape) for p in outside.values())),
        layers=tuple(_unit(layer) for layer in stack),
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        heads=heads,
        vocabulary=config.vocab_size,
        tied=head is not None and head.weight is lm.get_input_embeddings().weight,
    )


def _unit(layer: nn.Module) -> Unit:
    linears = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            linears.append((name, module.out_features, module.in_features))
        elif isinstance(module, Conv1D):  # of GPT-2: the same, transposed
            linears.append((name, module.weight.shape[1], module.weight.shape[0]))
    return Unit(tuple(tuple(p.shape) for p in layer.parameters()), tuple(linears))


def _total(sizes: Iterable[Size]) -> int:
    return sum(math.prod(size) for size in sizes)
