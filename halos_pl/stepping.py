"""How a module takes its optimizer steps: gradients of the exact mean, clipped by their norm over all ranks."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable

from halos_pl import resume
from halos_pl.accumulation import StepMean
from halos_pl.metrics import Averages
from halos_pl.models import ModelError
from halos_pl.parallel import whole
from halos_pl.schedule import Schedule, learning_rate


class SteppedModule(L.LightningModule):
    """Optimizer, schedule, accumulation and clipping; what is computed is the subclass's.

    Args:
        optimizer: of the parameters that are trained.
        schedule: of the learning rate after the warm-up.
        warmup: optimizer steps (from 1 on), or a share of all steps (below 1).

    Raises:
        ValueError: a warm-up that is neither.
    """

    def __init__(self, optimizer: OptimizerCallable, schedule: Schedule, warmup: int | float) -> None:
        super().__init__()
        if not 0 <= warmup < math.inf or (warmup >= 1 and warmup != int(warmup)):
            raise ValueError(f"warmup must be a share in [0, 1) or a number of steps from 1 on, got {warmup}")
        self.optimizer_factory, self.schedule, self.warmup = optimizer, schedule, warmup
        self.train_averages = Averages()
        self._step_mean = StepMean()
        self._fresh: resume.FreshSettings | None = None

    def on_train_start(self) -> None:
        self._step_mean.restart()
        if self._fresh is not None:
            self._fresh.win()

    def configure_optimizers(self) -> Any:
        try:
            optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        except ValueError as error:
            raise ModelError(f"--model.optimizer: {error}") from error
        warmup = 0 if getattr(self.trainer, "fast_dev_run", False) else self.warmup  # a dry run ends long before
        scheduler = learning_rate(optimizer, self.schedule, warmup, self.trainer.estimated_stepping_batches)
        self._fresh = resume.FreshSettings(optimizer, scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._step_mean.rescale(self.parameters(), self.trainer.accumulate_grad_batches)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.train_averages.update({"grad_norm": (whole(norm)[None], None)})
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
