"""The learning rate over a run: a warm-up, then constant, or a decay to 0 at the last step."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from halos_pl.models import ModelError

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate(optimizer: Optimizer, name: Schedule, warmup: int | float, steps: int | float) -> LambdaLR:
    """A scheduler to step once an optimizer step.

    Args:
        optimizer: its learning rates are the highest ones.
        name: what follows the warm-up.
        warmup: optimizer steps (from 1 on), or a share of all steps (below 1).
        steps: of the run; inf where it has no end.

    Raises:
        ModelError: a decay or a share without an end, or a warm-up longer than the run.
    """
    if not math.isfinite(steps) and (name != "constant" or 0 < warmup < 1):
        raise ModelError(
            f"a {name} schedule with warmup {warmup} needs an end: set --trainer.max_steps or --trainer.max_epochs, or "
            "take --model.schedule constant and warmup in steps"
        )
    rising = int(warmup * steps) if 0 < warmup < 1 else int(warmup)
    if rising > steps:
        raise ModelError(f"--model.warmup: {rising} steps of warm-up, but the run has {steps}")
    if name == "constant":
        return get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=rising)
    return get_scheduler(name, optimizer, num_warmup_steps=rising, num_training_steps=int(steps))
