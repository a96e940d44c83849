"""The reference that shares the policy's weights. What it scores is in test_pair.py, beside those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from halos_pl.data.collate import sequences
from halos_pl.models import LoRA, ModelSource
from halos_pl.scoring import SharedReference, load_pair


def test_an_error_within_leaves_the_policy_as_it_was(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource(str(tiny_model))
    policy, reference = load_pair(source, source, LoRA(r=2))
    assert isinstance(reference, SharedReference)
    ids = torch.arange(3, 19).numpy()
    rows = sequences([(ids[:4], ids[4:])], pad_id=0, vocab_size=260)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05)
    before = policy(rows).logp

    def full(x: Tensor) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(policy.lm.transformer.ln_f, "forward", full)
    with pytest.raises(MemoryError):
        reference(rows)
    monkeypatch.undo()
    assert policy.training
    assert torch.equal(policy(rows).logp, before)
    assert policy(rows).logp.requires_grad
