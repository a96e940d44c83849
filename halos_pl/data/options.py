"""Options of the data that are out of range, that an objective has no use for, or that it cannot do without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from halos_pl.batch import DataNeeds
from halos_pl.data.records import DataError
from halos_pl.data.sources import Source

LEAST = {
    "batch_size": 1,
    "eval_batch_size": 1,
    "pad_to_multiple_of": 1,
    "length_groups": 1,
    "num_workers": 0,
    "prepare_workers": 1,
    "max_tokens": 1,
}
CHOICES = {
    "mismatch": ("dataset", "batch"),
    "unpair": ("both", "one"),
    "sampler": ("shuffle", "stratified"),
    "assistant_turns": ("last", "all"),
    "special_tokens": ("refuse", "allow"),
    "on_bad_row": ("error", "skip"),
}
SHARES = ("keep_desirable", "keep_undesirable")


def check_ranges(given: Mapping[str, Any]) -> None:
    """ValueError that names the first option with an impossible value."""
    for name, bound in LEAST.items():
        if given[name] is not None and given[name] < bound:
            raise ValueError(f"{name} must be at least {bound}, got {given[name]}")
    for name, allowed in CHOICES.items():
        if given[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {given[name]!r}")
    for name in SHARES:
        if not 0 < given[name] <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {given[name]}")
    share = given["validation_share"]
    if share is not None:
        if not 0 < share < 1:
            raise ValueError(f"validation_share must be in (0, 1), got {share}")
        if given["validation"] is not None or given["validation_split"] is not None:
            raise ValueError("validation_share holds out rows of train; leave validation and validation_split out")
    if given["sampler"] == "stratified" and given["group_by_prompt"]:
        raise ValueError("sampler stratified makes couples of all prompts; it does not go with group_by_prompt")
    if given["mismatch"] == "batch":
        for name in ("group_by_prompt", "max_tokens"):
            if given[name]:
                raise ValueError(f"mismatch batch needs full micro-batches of several prompts, not {name}")


def refuse_weights(sources: Mapping[Any, Sequence[Source]]) -> None:
    """ValueError for a weight where rows count once: of held-out and test rows."""
    for part in ("validation", "test"):
        for source in sources[part]:
            if source.weight != 1:
                raise ValueError(
                    f"{part}: {source.name} has weight {source.weight}, which is for training; give a limit"
                )


def refuse_unused(given: Mapping[str, Any], needs: DataNeeds) -> None:
    """An option that the objective has no use for is a mistake."""
    unpaired = needs.view == "unpaired"
    for option, unused in (
        ("sampler stratified", given["sampler"] == "stratified" and not unpaired),
        ("unpair one", given["unpair"] == "one" and not unpaired),
        ("mismatch batch", given["mismatch"] == "batch" and not needs.mismatched),
        ("pair_labels true", given["pair_labels"] and needs.view != "paired"),
        ("assistant_turns all", given["assistant_turns"] == "all" and needs.view != "sft"),
        ("shuffle_labels true", given["shuffle_labels"] and needs.view == "sft"),
        *((f"{name} {given[name]}", given[name] != 1 and not unpaired) for name in SHARES),
    ):
        if unused:
            raise DataError(f"data.{option}: this objective has no use for it; leave it out")


def refuse_unequal_halves(given: Mapping[str, Any], needs: DataNeeds, stage: str) -> None:
    """Where every micro-batch must hold equal halves, the sampler and the batch sizes have to allow for it."""
    if not needs.equal_halves or stage == "predict":
        return
    wants = "this objective needs as many desirable as undesirable rows in every micro-batch"
    if stage == "fit" and given["sampler"] != "stratified":
        raise DataError(f"data.sampler {given['sampler']}: {wants}: --data.sampler stratified")
    for name in ("batch_size", "eval_batch_size") if stage == "fit" else ("eval_batch_size",):
        if (size := given[name]) % 2:
            raise DataError(f"data.{name} {size}: {wants}, so an even size: --data.{name} {size + 1}")
