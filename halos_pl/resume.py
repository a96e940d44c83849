"""What a checkpoint must agree on with the run that goes on from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from halos_pl.models import ModelError

KEY = "halos_pl"


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
