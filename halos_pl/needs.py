"""What an objective asks of the models and of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from halos_pl.batch import DataNeeds
from halos_pl.losses import Objective
from halos_pl.models import ModelSource


def reference_source(objective: Objective, policy: ModelSource, reference: str) -> ModelSource | None:
    """The reference model to load, or None.

    Args:
        objective: says whether it compares with one.
        policy: where the policy comes from.
        reference: `copy` (of the policy), `none`, or a folder or hub name.

    Raises:
        ValueError: the objective has no use for the reference named, or cannot do without one.
    """
    name = type(objective).__name__
    if not objective.needs_reference:
        if reference not in ("copy", "none"):
            raise ValueError(f"{name} compares with no reference: leave --model.reference {reference} out")
        return None
    if reference == "none":
        if objective.reference_free == "refused":
            raise ValueError(
                f"{name} compares policy and reference and has no reference-free form: "
                "set --model.reference copy, or a folder or hub name"
            )
        if objective.reference_point_from == "none":
            raise ValueError(
                f"{name} without a reference compares mean log-probabilities with their z0: leave "
                "--model.objective.reference_point true, or set --model.reference copy"
            )
        if objective.token_clamp is not None:
            raise ValueError("humanline clamps log-ratios to a reference: leave it or --model.reference none out")
        return None
    return policy if reference == "copy" else replace(policy, name=reference, config=None)


def data_needs(
    objective: Objective, models: Sequence[ModelSource], tokenizer: str, *, trust_remote_code: bool
) -> DataNeeds:
    """What the data module must bring.

    Args:
        objective: says how it reads feedback.
        models: the policy and, where there is one, the reference.
        tokenizer: folder or hub name.
        trust_remote_code: run tokenizer code that the folder or hub brings.
    """
    return DataNeeds(
        view=objective.view,
        mismatched=objective.reference_point_from == "mismatched",
        tokenizer=tokenizer,
        vocab_size=min(model.vocab_size for model in models),
        max_positions=min((model.max_positions for model in models if model.max_positions), default=None),
        reference=None if models[-1] is models[0] else models[-1].name,
        trust_remote_code=trust_remote_code,
        control=objective.control,
        scores=objective.needs_scores,
        equal_halves=objective.equal_halves,
    )
