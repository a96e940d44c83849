"""Policy and reference as a run holds them: loaded, verified, adapted, and in shards where the strategy says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch.distributed as dist
from transformers import PreTrainedModel

from halos_pl.models import (
    START,
    LoRA,
    ModelError,
    ModelSource,
    adapt,
    enable_checkpointing,
    find_head,
    load_model,
    load_skeleton,
    verify_head,
)
from halos_pl.parallel import Plan, adopt, decoder_layers, layout
from halos_pl.scoring.scorer import Scorer
from halos_pl.scoring.shared_reference import SharedReference

Reference = Scorer | SharedReference
T = TypeVar("T")


def load_pair(
    source: ModelSource,
    reference: ModelSource | None,
    lora: LoRA | None = None,
    *,
    value_head: bool = False,
    checkpointing: bool = False,
    compile_layers: bool = False,
    plan: Plan | None = None,
    offload_reference: bool = False,
) -> tuple[Scorer, Reference | None]:
    """The policy, in training mode, and the frozen reference where there is one.

    With adapters, a reference that is the policy at its start is no second model: it is the policy with its adapters
    off. With an adapter to go on with there are two such: `reference is source`, the policy at its start, is the model
    with that adapter as it was; an equal source of its own is the model without.

    Where models are sharded, the first rank alone reads weights and the others get their rows from it, so that a host
    holds one whole copy and not one a rank.

    Args:
        source: of the policy.
        reference: of the reference, if any.
        lora: adapters to train; None trains all weights.
        value_head: as `Scorer` takes it.
        checkpointing: recompute the policy's activations in the backward pass.
        compile_layers: run every layer of both through torch.compile.
        plan: how they are sharded; None where they stay whole.
        offload_reference: keep its shards in the host's memory.

    Raises:
        ModelError: a model or an adapter cannot be used; on every rank, what the first one found.
    """
    shared, begins = lora is not None and reference == source, False
    if lora is not None:
        if plan is not None and lora.quantize != "none":
            raise ModelError("--model.lora.quantize: quantized weights are not sharded; take --trainer.strategy ddp")
        begins = shared and lora.adapter is not None and reference is source
        source = replace(source, quantize=lora.quantize)
        reference = reference and replace(reference, quantize=lora.quantize)
    lm, other = _load(source, plan), None
    if reference is not None and not shared:
        other = copy.deepcopy(lm) if reference == source else _load(reference, plan)
    if lora is not None:
        _told(lambda: adapt(lm, lora, source, keep_start=begins), plan)
    if checkpointing:
        enable_checkpointing(lm)
    policy = _placed(Scorer(lm, value_head=value_head), compile_layers, plan)
    if other is not None:
        frozen = Scorer(other).requires_grad_(False).eval()
        return policy, _placed(frozen, compile_layers, plan, offload=offload_reference)
    if lora is None or not shared:
        return policy, None
    return policy, SharedReference(policy, START if begins else None, dropout=source.dropout or lora.dropout > 0)


def _load(source: ModelSource, plan: Plan | None) -> PreTrainedModel:
    def read() -> PreTrainedModel:
        if plan is not None and dist.get_rank():
            return load_skeleton(source)
        lm = load_model(source)
        verify_head(lm, find_head(lm))
        return lm

    lm = _told(read, plan)
    if plan is not None and dist.get_world_size() > 1:
        told = [layout(lm)]  # the weights decide what is tied
        dist.broadcast_object_list(told, 0)
        if dist.get_rank():
            adopt(lm, told[0])
    return lm


def _told(work: Callable[[], T], plan: Plan | None) -> T:
    """What each rank makes; an error of one is that of all."""
    if plan is None:
        return work()
    errors: list[str | None] = [None]
    try:
        made = work()
    except ModelError as found:
        errors = [str(found)]
    mine, errors = errors[0], [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine)
    if wrong := [x for x in errors if x is not None]:
        raise ModelError(wrong[0])
    return made


def _placed(scorer: Scorer, compile_layers: bool, plan: Plan | None, *, offload: bool = False) -> Scorer:
    if compile_layers:
        for layer in decoder_layers(scorer):
            layer.compile()
    if plan is not None:
        plan.shard(scorer, offload=offload, methods=["generate"])
    return scorer
