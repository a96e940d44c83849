"""The mean over an optimizer step, exact under accumulation and ranks of different sizes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from halos_pl.parallel import local


class StepMean:
    """Makes the gradient of an optimizer step that of Σ losses / Σ count, over its micro-batches and all ranks.

    The trainer averages over micro-batches, and data-parallel strategies over ranks: both are wrong as soon as
    micro-batches hold different counts (SFT's tokens, the last, smaller batch, an accumulation cut short by the end of
    the epoch). So a micro-batch's loss is its sum over the *first* micro-batch's count, and before the optimizer step
    the gradients are scaled by what that divisor was off. Without accumulation, or where all counts agree, the factor
    is 1 and no gradient is touched.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget a window that was never finished."""
        self.first: int | Tensor | None = None  # global count of the window's first micro-batch
        self.total: int | Tensor = 0  # global count of the window so far

    def normalize(self, losses: Tensor) -> Tensor:
        """The 0-d loss to differentiate for unreduced losses [B] or [N]: their mean, for the first micro-batch."""
        count: int | Tensor = losses.numel()
        world = 1
        if dist.is_available() and dist.is_initialized():
            world = dist.get_world_size()
            count = torch.tensor(float(count), device=losses.device, dtype=torch.float64)
            dist.all_reduce(count)
        if self.first is None:
            self.first, self.total = count, 0
        self.total = self.total + count
        scale = world / self.first
        return losses.sum() * (scale.to(losses.dtype) if isinstance(scale, Tensor) else scale)

    def rescale(self, parameters: Iterable[nn.Parameter], accumulated: int) -> None:
        """Scale the gradients, once, before clipping and the optimizer step.

        Args:
            parameters: those with gradients.
            accumulated: the micro-batches that the trainer divided each loss by.
        """
        if self.first is None:
            return
        factor = self.first * accumulated / self.total
        self.first = None
        if isinstance(factor, Tensor):
            if accumulated == 1:
                return
        elif factor == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                grad = local(parameter.grad)
                grad.mul_(factor.to(grad.dtype) if isinstance(factor, Tensor) else factor)
