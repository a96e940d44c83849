"""A Llama so small that its numbers are computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from halos_pl.estimate import Plan, Shapes, read_shapes
from halos_pl.models import ModelSource

CONFIG = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def config() -> dict[str, Any]:
    return dict(CONFIG)


@pytest.fixture
def shapes(config: dict[str, Any]) -> Shapes:
    """Layers of 496 parameters: q and o 8·8, k and v 4·8, MLP 3·12·8, norms 2·8. Root of 168: 2·10·8 and a norm."""
    return read_shapes(ModelSource(config=config))


@pytest.fixture
def plan() -> Plan:
    """n = 6 tokens, N = 3 of them scored; KTO with a reference on two GPUs."""
    return Plan(rows=2, length=3, gpus=2, shard=2, strategy="fsdp")
