"""What a checkpoint must agree on with the run that goes on from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from halos_pl.models import ModelError

KEY = "halos_pl"
OF_OBJECTIVE = ("running_mean.", "policy.value_head.")
"""Prefixes of state that some objectives have; another one that scores the policy leaves it aside."""


def settings(objective: object, optimizer: Callable[..., Optimizer], schedule: str) -> dict[str, str]:
    """What a run is trained with, in words that can be compared."""
    probe = optimizer([torch.nn.Parameter(torch.zeros(1, 1))])
    return {"objective": str(objective), "optimizer": f"{type(probe).__name__} {probe.defaults}", "schedule": schedule}


def check(checkpoint: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    """Compare settings that the restored optimizer and schedule would silently override.

    Args:
        checkpoint: as Lightning loads it.
        settings: of this run, by name.

    Raises:
        ModelError: naming each setting that differs.
    """
    stored = checkpoint.get(KEY, {})
    changed = [
        f"{name} was {old}, now {settings[name]}" for name, old in stored.items() if settings.get(name, old) != old
    ]
    if changed:
        raise ModelError(
            "a run goes on with its own settings, but " + "; ".join(changed) + "; to begin anew from the trained "
            "weights, give the exported folder to --model.policy"
        )
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    if progress and not progress.get("is_last_batch", True):
        warnings.warn(
            "the checkpoint was taken in the middle of an epoch: going on from there does not repeat the exact order",
            stacklevel=2,
        )


def fitting(stored: Mapping[str, Any], own: Mapping[str, Any], objective: object) -> dict[str, Any]:
    """A checkpoint's state without what only the objective that it was trained with has a use for.

    Args:
        stored: of the checkpoint.
        own: of the module at hand.
        objective: of the module.

    Raises:
        ModelError: this objective keeps something that the checkpoint lacks.
    """
    if missing := [key for key in own if key.startswith(OF_OBJECTIVE) and key not in stored]:
        name = type(objective).__name__
        raise ModelError(f"the checkpoint is of another objective: {name} needs its {', '.join(missing)}")
    return {key: value for key, value in stored.items() if key in own or not key.startswith(OF_OBJECTIVE)}
