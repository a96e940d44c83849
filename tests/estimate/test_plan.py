"""A plan that cannot be is told."""

from __future__ import annotations

from typing import Any

import pytest

from halos_pl.estimate import Lora, Plan, PlanError


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"scored": 1.5}, r"scored must be in \(0, 1\]"),
        ({"gpus": 8, "shard": 3}, "--shard 3 does not divide the 8 GPUs"),
        ({"strategy": "ddp"}, "--shard 2 needs --trainer.strategy fsdp, not ddp"),
        ({"strategy": "single", "shard": 1}, "2 GPUs need --trainer.strategy fsdp or ddp"),
        ({"compute": "autocast"}, "FSDP2 casts the weights itself"),
        ({"reference": "adapter"}, "needs --model.lora.r"),
    ],
)
def test_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        Plan(**({"rows": 1, "length": 1, "gpus": 2, "shard": 2, "strategy": "fsdp"} | changes))


def test_passes() -> None:
    def passes(**changes: Any) -> list[int]:
        return list(Plan(rows=1, length=1, **changes).passes.values())

    assert passes() == [1, 1, 1, 1, 1]
    assert passes(mismatched=False) == [0, 1, 1, 0, 1]
    assert passes(mismatched=False, reference="none") == [0, 1, 1, 0, 0]
    assert passes(reference="cached") == [1, 1, 1, 0, 0]
    assert passes(reference="adapter", lora=Lora()) == [1, 1, 1, 1, 1]
