"""What keeps a run from going on when it should not: numbers that are not finite, no memory, ranks that hang."""

from __future__ import annotations

import math
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from halos_pl.batch import Batch
from halos_pl.memory import Device, Settings, Shape, explain, is_out_of_memory
from halos_pl.module import AlignmentModule
from halos_pl.ranks import agree, set_patience
from halos_pl.signals import end_children
from halos_pl.watchdog import Watchdog


class Guards(L.Callback):
    """Watches a training. What it finds ends the run with a message that says what to change.

    Args:
        nonfinite: When the loss or the gradient of a step is not finite (NaN, infinite): `stop`, found at the next
            logged step, validation or checkpoint, so that nothing waits for the device in between and no such state is
            saved; or `skip` the step, which then changes neither weights nor optimizer nor averages, at the price of
            waiting for the device once a step.
        max_skipped: Most steps that a run skips in all; one more ends it.
        timeout: Minutes that a rank may stay at one place of a step or of a validation batch before its process ends,
            with status 75, naming the rank that holds the others up. Saving, sampling and export take their time.
    """

    def __init__(
        self, nonfinite: Literal["stop", "skip"] = "stop", max_skipped: int = 10, timeout: float = 30.0
    ) -> None:
        if max_skipped < 0:
            raise ValueError(f"guards.max_skipped must be at least 0, got {max_skipped}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"guards.timeout must be a finite number of minutes > 0, got {timeout}")
        self.nonfinite, self.max_skipped, self.timeout = nonfinite, max_skipped, timeout
        self.skipped = 0
        self._first: Tensor | None = None  # int64 [2]: step where loss, gradient first was not finite; 0 for never
        self._bad_loss: Tensor | None = None  # bool, 0-d: of the step at hand
        self._kept: list[tuple[Tensor, Tensor]] = []  # what a step that is skipped must leave as it was
        self._shape: Shape | None = None
        self._where, self._resting, self._ended = "the start", 0, False
        self._dog: Watchdog | None = None
        self._trainer: L.Trainer | None = None

    @property
    def patience(self) -> timedelta:
        """Of collectives: longer than the watchdog's, which knows more to say."""
        return timedelta(minutes=self.timeout, seconds=60)

    def give_time(self, strategy: object) -> None:
        """Make a strategy's process groups, before it makes them, wait as long as this guard does, unless it has a time
        of its own."""
        set_patience(self.patience)
        if getattr(strategy, "_timeout", None) == default_pg_timeout:
            strategy._timeout = self.patience  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------ numbers

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, AlignmentModule):
            self._trainer, self._first, self._bad_loss, self._ended = trainer, None, None, False
            pl_module.accepts_step = self._accepts
            pl_module.nan_passes = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.nonfinite == "skip":
            self._module.told["skipped"] = self.skipped
        if trainer.world_size > 1:
            launcher: Any = trainer.strategy.launcher
            store: Any = torch.distributed.distributed_c10d._get_default_store()
            with suppress(NotImplementedError, RuntimeError):  # a connection of its own, where the store has any
                store = store.clone()
            self._dog = Watchdog(
                *(60 * self.timeout, trainer.global_rank, trainer.world_size, store),
                at_end=lambda: end_children(getattr(launcher, "procs", ()), 0),
            )
            self._dog.start()
        self._at(f"step {trainer.global_step + 1}")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *_: Any) -> None:
        self._at(f"step {trainer.global_step + 1}", batch)
        if pl_module.device.type == "cuda":
            self._resting = torch.cuda.memory_allocated(pl_module.device)
        if self.nonfinite == "skip" and not self._kept:
            assert isinstance(pl_module, AlignmentModule)
            averages = pl_module.train_averages
            state = [averages.total, averages.weight]
            if pl_module.running_mean is not None:
                state += [pl_module.running_mean.total, pl_module.running_mean.count]
            self._kept = [(x, x.clone()) for x in state]

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        bad = ~loss.detach().isfinite()
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad

    def _accepts(self, norm: Tensor) -> bool:
        """Whether the optimizer step with a gradient of this norm is taken; otherwise there is no gradient any more."""
        trainer = self._trainer
        assert trainer is not None
        bad_norm = ~norm.isfinite()
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            bad_norm = torch.zeros_like(bad_norm)  # a loss scaler looks for its scale by overflowing
        bad_loss = torch.zeros_like(bad_norm) if self._bad_loss is None else self._bad_loss
        bad, self._bad_loss = torch.stack([bad_loss, bad_norm]), None
        if self.nonfinite == "stop":
            first = torch.zeros_like(bad, dtype=torch.int64) if self._first is None else self._first
            self._first = torch.where(bad & (first == 0), trainer.global_step + 1, first)
            return True
        kept, self._kept = self._kept, []
        what = agree(*map(float, bad.tolist()))
        if not any(what):
            return True
        for state, before in kept:
            state.copy_(before)
        for parameter in self._module.parameters():
            parameter.grad = None  # the optimizer passes over it, its state included
        self.skipped += 1
        self._module.told["skipped"] = self.skipped
        if self.skipped > self.max_skipped:
            told = f"the {_named(what)} is not finite, after {self.max_skipped} skipped steps (--guards.max_skipped)"
            raise self._module.diverged(told, trainer.global_step + 1)
        if trainer.is_global_zero:
            print(f"step {trainer.global_step + 1} is skipped: its {_named(what)} is not finite")
        return False

    @property
    def _module(self) -> AlignmentModule:
        assert self._trainer is not None
        module = self._trainer.lightning_module
        assert isinstance(module, AlignmentModule)
        return module

    def look(self) -> None:
        """Wait for the device, and see whether any step so far was not finite. A collective.

        Raises:
            ModelError: on every rank, naming the first such step.
        """
        steps = [0, 0] if self._first is None else self._first.tolist()
        found = [-x for x in agree(*(-x if x else -math.inf for x in steps))]
        if (step := min(found)) < math.inf:
            raise self._module.diverged(f"the {_named([x == step for x in found])} is not finite", int(step))

    def _look_at_weights(self) -> None:
        """The last step may have left weights that are not finite, which only the next loss would show."""
        weights = [p.to_local() if hasattr(p, "to_local") else p for p in self._module.parameters() if p.requires_grad]
        largest = torch.nn.utils.get_total_norm([x.detach() for x in weights if x.numel()], math.inf)
        if agree(not largest.isfinite())[0]:
            raise self._module.diverged("the weights are not finite")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the trainer's connectors
        if not trainer.fit_loop._should_accumulate() and every and not trainer.global_step % every:
            self.look()
        self._at(f"fetching the batch after step {trainer.global_step}")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._at("saving", limited=False)
        if self._trainer is not None:
            self.look()
            self._look_at_weights()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.look()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = True
        self._at("the end of training")
        self.look()
        self._look_at_weights()

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    # ------------------------------------------------------------------------------------------ places

    def _at(self, where: str, batch: Batch | None = None, *, limited: bool = True) -> None:
        self._where, self._shape = where, None if batch is None else Shape.of(batch)
        if self._dog is not None:
            self._dog.beat(where, limited=limited and not self._ended)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int, *_: Any
    ) -> None:
        self._at(f"validation batch {batch_idx + 1} after step {trainer.global_step}", batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._at(f"the samples after step {trainer.global_step}", limited=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._at(f"the end of the validation after step {trainer.global_step}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    # ------------------------------------------------------------------------------------------ memory

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Rewrite what an allocator says: its error keeps its type."""
        if is_out_of_memory(exception):
            data, rank = getattr(trainer, "datamodule", None), trainer.global_rank
            settings = Settings(
                getattr(data, "batch_size", 1),
                getattr(data, "max_tokens", None),
                trainer.accumulate_grad_batches,
                getattr(pl_module, "gradient_checkpointing", False),
            )
            where = self._where + (f" on rank {rank}" if trainer.world_size > 1 else "")
            device = Device()
            with suppress(RuntimeError):
                device = Device.now(pl_module.device, self._resting)
            exception.args = (explain(exception, where, self._shape, device, settings),)
        self._release()

    def _release(self) -> None:
        if self._dog is not None:
            self._dog.stop()
        self._dog = self._trainer = None


def _named(found: Any) -> str:
    """Which of loss and gradient: the gradient of a loss that is not finite is no news."""
    return "loss" if next(iter(found)) else "gradient"
