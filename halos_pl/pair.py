"""Policy and reference as a run holds them: loaded, verified, and in shards where the strategy says so."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch.distributed as dist
from transformers import PreTrainedModel

from halos_pl.models import (
    ModelError,
    ModelSource,
    enable_checkpointing,
    find_head,
    load_model,
    load_skeleton,
    verify_head,
)
from halos_pl.parallel import Layout, Plan, adopt, decoder_layers, layout
from halos_pl.scoring import Scorer


@dataclass(frozen=True)
class PairOptions:
    """How the two are held.

    Args:
        value_head: of the policy.
        gradient_checkpointing: recompute the policy's activations.
        compile: every layer of both by itself.
        offload_reference: where they are sharded.
    """

    value_head: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    offload_reference: bool = False


def make_pair(
    policy: ModelSource, reference: ModelSource | None, options: PairOptions, plan: Plan | None = None
) -> tuple[Scorer, Scorer | None]:
    """Policy, in training mode, and the frozen reference.

    Where models are sharded, the first rank alone reads the weights and the others get their rows from it, so that a
    host holds one whole copy, not one a rank.

    Args:
        policy: where it comes from.
        reference: where the reference comes from; None for none, equal to `policy` for a copy.
        options: of both.
        plan: how they are sharded; None where they stay whole.

    Raises:
        ModelError: on every rank, what one of them found.
    """
    lm = _load(policy, plan)
    other = None
    if reference is not None:
        other = copy.deepcopy(lm) if reference == policy else _load(reference, plan)
    if options.gradient_checkpointing:
        enable_checkpointing(lm)
    first = _placed(Scorer(lm, value_head=options.value_head), options.compile, plan)
    if other is None:
        return first, None
    frozen = Scorer(other).requires_grad_(False).eval()
    return first, _placed(frozen, options.compile, plan, offload=options.offload_reference)


def _load(source: ModelSource, plan: Plan | None) -> PreTrainedModel:
    def read() -> PreTrainedModel:
        lm = load_model(source)
        verify_head(lm, find_head(lm))
        return lm

    if plan is None or dist.get_world_size() == 1:
        return read()
    lm, first, said = None, dist.get_rank() == 0, ""
    try:
        lm = read() if first else load_skeleton(source)
    except ModelError as error:
        said = str(error)
    told: list[tuple[str, Layout]] = [("", {})] * dist.get_world_size()
    dist.all_gather_object(told, (said, layout(lm) if lm is not None and first else {}))
    if lm is None or any(error for error, _ in told):  # one rank's error is that of all
        raise ModelError(next(error for error, _ in told if error))
    if not first:
        adopt(lm, told[0][1])
    return lm


def _placed(scorer: Scorer, compile_layers: bool, plan: Plan | None, *, offload: bool = False) -> Scorer:
    if compile_layers:
        for layer in decoder_layers(scorer):
            layer.compile()
    if plan is not None:
        plan.shard(scorer, offload=offload, methods=["generate"])
    return scorer
