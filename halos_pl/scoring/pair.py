"""Policy and reference of a run, from where they come from."""

from __future__ import annotations

import copy
from dataclasses import replace

from halos_pl.models import (
    START,
    LoRA,
    ModelSource,
    adapt,
    enable_checkpointing,
    find_head,
    load_model,
    verify_head,
)
from halos_pl.scoring.scorer import Scorer
from halos_pl.scoring.shared_reference import SharedReference

Reference = Scorer | SharedReference


def load_pair(
    source: ModelSource,
    reference: ModelSource | None,
    lora: LoRA | None = None,
    *,
    value_head: bool = False,
    checkpointing: bool = False,
) -> tuple[Scorer, Reference | None]:
    """The policy, and the frozen reference where there is one.

    With adapters, a reference that is the policy at its start is no second model: it is the policy with its adapters
    off. With an adapter to go on with there are two such: `reference is source`, the policy at its start, is the model
    with that adapter as it was; an equal source of its own is the model without.

    Args:
        source: of the policy.
        reference: of the reference, if any.
        lora: adapters to train; None trains all weights.
        value_head: as `Scorer` takes it.
        checkpointing: recompute the policy's activations in the backward pass.

    Raises:
        ModelError: a model or an adapter cannot be used.
    """
    shared, begins = lora is not None and reference == source, False
    if lora is not None:
        begins = shared and lora.adapter is not None and reference is source
        source = replace(source, quantize=lora.quantize)
        reference = reference and replace(reference, quantize=lora.quantize)
    lm = load_model(source)
    verify_head(lm, find_head(lm))
    other: Reference | None = None
    if reference is not None and not shared:
        frozen = copy.deepcopy(lm) if reference == source else load_model(reference)
        verify_head(frozen, find_head(frozen))
        other = Scorer(frozen).requires_grad_(False).eval()
    if lora is not None:
        adapt(lm, lora, source, keep_start=begins)
    if checkpointing:
        enable_checkpointing(lm)
    policy = Scorer(lm, value_head=value_head)
    if lora is None or not shared:
        return policy, other
    return policy, SharedReference(policy, START if begins else None, dropout=source.dropout or lora.dropout > 0)
