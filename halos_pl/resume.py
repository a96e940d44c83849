"""What a checkpoint must agree on with the run that goes on from it, and what the run's own settings say instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

import lightning as L
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from halos_pl.models import ModelError

KEY = "halos_pl"
OF_OBJECTIVE = ("running_mean.", "policy.value_head.")
"""Prefixes of state that some objectives have; another one that scores the policy leaves it aside."""
SHOWN = 4


def settings(objective: object, optimizer: Callable[..., Optimizer]) -> dict[str, str]:
    """What the state of a run belongs to: the kinds of objective and optimizer. Their numbers may change."""
    probe = optimizer([torch.nn.Parameter(torch.zeros(1, 1))])
    return {"objective": type(objective).__name__, "optimizer": type(probe).__name__}


def check(checkpoint: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    """Refuse a checkpoint whose state means something else here.

    Args:
        checkpoint: as Lightning loads it.
        settings: of this run, by name.

    Raises:
        ModelError: naming what differs.
    """
    if KEY not in checkpoint:
        raise ModelError("the checkpoint is not of halos_pl: it says nothing of objective and optimizer")
    stored = checkpoint[KEY]
    changed = [
        f"{name} was {stored[name]}, now {now}" for name, now in settings.items() if stored.get(name, now) != now
    ]
    if changed:
        raise ModelError(
            "a run goes on with its own objective, optimizer and adapters, but "
            + "; ".join(changed)
            + "; to begin anew "
            "from the trained weights, give the exported folder to --model.policy"
        )


def fitting(stored: Mapping[str, Any], module: L.LightningModule) -> dict[str, Any]:
    """A checkpoint's state for the module at hand, which keeps the rest as it is.

    Args:
        stored: of the checkpoint.
        module: with its models.

    Raises:
        ModelError: of another model, or this objective keeps something that the checkpoint lacks.
    """
    own = module.state_dict()
    wanted = [name for name, p in module.named_parameters() if p.requires_grad]
    wanted += [name for name in own if name.startswith("running_mean.")]
    if missing := [name for name in wanted if name.startswith(OF_OBJECTIVE) and name not in stored]:
        name = type(getattr(module, "objective", None)).__name__
        raise ModelError(f"the checkpoint is of another objective: {name} needs its {', '.join(missing)}")
    wrong = [f"it has no {name}" for name in wanted if name not in stored]
    for name, value in stored.items():
        if name not in own and not name.startswith(OF_OBJECTIVE):
            wrong.append(f"its {name} is not here")
        elif name in own and own[name].shape != value.shape:
            wrong.append(f"its {name} is {list(value.shape)}, here {list(own[name].shape)}")
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ModelError(f"the checkpoint is of another model: {'; '.join(wrong[:SHOWN])}{more}")
    return {name: value for name, value in stored.items() if name in own}


class FreshSettings:
    """Optimizer and schedule as this run configures them, to win over what a checkpoint has restored.

    Args:
        optimizer: before anything is restored.
        scheduler: of it.
    """

    def __init__(self, optimizer: Optimizer, scheduler: LambdaLR) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler
        self.groups = [{key: x for key, x in group.items() if key != "params"} for group in optimizer.param_groups]
        self.rates = list(scheduler.base_lrs)

    def win(self) -> None:
        """Put the settings back; the learning rate is that of the present step under the present schedule."""
        self.scheduler.base_lrs = list(self.rates)
        step = self.scheduler.last_epoch
        rates = [rate * scale(step) for rate, scale in zip(self.rates, self.scheduler.lr_lambdas, strict=True)]
        for group, fresh, rate in zip(self.optimizer.param_groups, self.groups, rates, strict=True):
            group.update(fresh)
            group["lr"] = rate
        self.scheduler._last_lr = rates


def noise_seed(seed: int, trainer: L.Trainer) -> int:
    """A seed for dropout, of (seed, micro-batch of the run, rank) alone."""
    place = f"{seed}:{trainer.fit_loop.epoch_loop.total_batch_idx}:{trainer.global_rank}"
    return int.from_bytes(blake2b(place.encode(), digest_size=8).digest(), "big") >> 1
