"""How much a checkpoint takes, before there is one."""

from __future__ import annotations

from contextlib import suppress
from inspect import signature

import lightning as L
import torch


def estimated_bytes(trainer: L.Trainer) -> int:
    """Of a checkpoint: the trained parameters, and as much state for each as their optimizer keeps."""
    total = 0
    for optimizer in trainer.optimizers:
        sizes = [p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"]]
        total += int(sum(sizes) * (1 + _state_of_a_parameter(optimizer)))
    return total


def _state_of_a_parameter(optimizer: torch.optim.Optimizer) -> float:
    """Size of an optimizer's state, in sizes of the parameter; tried out on a small one."""
    parameter = torch.nn.Parameter(torch.ones(8, 8))
    known = signature(type(optimizer)).parameters  # AdamW has options that it does not take
    options = {key: value for key, value in optimizer.param_groups[0].items() if key in known and key != "params"}
    with suppress(Exception):  # an optimizer that wants more than parameters
        trial = type(optimizer)([parameter], **options)
        parameter.grad = torch.ones_like(parameter)
        trial.step()
        state = trial.state[parameter].values()
        return float(sum(isinstance(x, torch.Tensor) and x.shape == parameter.shape for x in state))
    return 2.0
