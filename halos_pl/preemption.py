"""The end of a run by a signal: the step is finished, the state saved, and all ranks leave together."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L

from halos_pl.ranks import agree
from halos_pl.signals import Preempted, Signals


class Preemption(L.Callback):
    """Ends training where SIGTERM, SIGUSR1 or Ctrl-C reached any rank: Preempted is raised on every one.

    From the first step on, the ranks ask each other at the end of every optimizer step (never within an accumulation
    window), and of every validation batch, whether one was signalled; then the state is saved as of the last step, and
    nothing that belongs to a finished run is done. Before the first step a signal ends the run at once. It stands in
    for Lightning's handlers of SIGTERM and of SLURM's signals, which would exit with 0, run collectives and save inside
    a signal handler, and broadcast once a batch.

    Args:
        signals: those that the program has taken over already. Default: they are taken over for the time of the run.
    """

    def __init__(self, signals: Signals | None = None) -> None:
        self.signals = signals or Signals()
        self._own = signals is None
        self._owed = False  # a validation that was left for a signal
        self._trained = False  # training is over: its end was saved as it should be

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._own:
            self.signals.__enter__()
        self.signals.children = getattr(trainer.strategy.launcher, "procs", ())
        connector: Any = trainer._signal_connector
        connector.register_signal_handlers = self.signals.install
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Preempted):
            _keep_alive()
        self._leave()

    def _leave(self) -> None:
        if self._own:
            self.signals.deferred = False
            self.signals.__exit__()

    # ------------------------------------------------------------------------------------------ where a run can end

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trained, self.signals.deferred = False, True
        with self._unless_signalled():
            agree()  # a rank that was ended just before is missed here, not in the middle of a step
        if self._owed:
            self._owed = False
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            follows = getattr(_keeper(trainer), "validation_follows", None)
            self._act(trainer, follows is not None and follows(trainer))

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._act(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trained = True
        self._act(trainer)

    def _act(self, trainer: L.Trainer, validation_follows: bool = False) -> None:
        with self._unless_signalled():
            (found,) = agree(self.signals.received)
        if not found:
            return
        _keep_alive()
        between = trainer.validating and not self._trained
        self._owed = between or validation_follows
        with _as_of_the_step(trainer, between=between):
            saved = save(trainer)
        name = Path(trainer.default_root_dir).name
        told = (
            "; nothing is saved" if saved is None else f", saved in {saved}; go on with --name {name} --ckpt_path last"
        )
        raise Preempted(int(found), f" after step {trainer.global_step}{told}")

    def state_dict(self) -> dict[str, Any]:
        return {"validation": self._owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._owed = state_dict["validation"]

    @contextmanager
    def _unless_signalled(self) -> Iterator[None]:
        """A rank that left at once takes the group with it: where this one was signalled too, that is why."""
        try:
            yield
        except RuntimeError:
            if self.signals.received:
                raise Preempted(self.signals.received) from None
            raise


def save(trainer: L.Trainer) -> Path | None:
    """Save the state of a run so that `--ckpt_path last` finds it; None where checkpoints are switched off.

    A checkpoint callback that has a method `save(trainer)` does it; otherwise this is a file `step=N.ckpt`.
    """
    keeper = _keeper(trainer)
    folder = Path(trainer.default_root_dir, "checkpoints")
    if keeper is None or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by the trainer's connectors
        return None
    if hasattr(keeper, "save"):
        return keeper.save(trainer) or folder
    path = folder / f"step={trainer.global_step}.ckpt"
    if not agree(path.exists())[0]:
        trainer.save_checkpoint(path)
    if trainer.is_global_zero:
        link = path.with_name("last.ckpt.new")
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, path.with_name("last.ckpt"))
    trainer.strategy.barrier("saved")
    return path


def _keeper(trainer: L.Trainer) -> Any:
    """The checkpoint callback that can be told to save, else the first one."""
    return next((x for x in trainer.checkpoint_callbacks if hasattr(x, "save")), trainer.checkpoint_callback)


@contextmanager
def _as_of_the_step(trainer: L.Trainer, *, between: bool) -> Iterator[None]:
    """In a validation, show Lightning's loops as they stood at the end of the training step before it.

    A checkpoint from there goes on with the whole validation and the next step; one that shows half a validation would
    go on with the other half, whose means would lack the first.
    """
    if not between:
        yield
        return
    loop: Any = trainer.fit_loop.epoch_loop
    done, held_out = loop.batch_progress, loop.val_loop.batch_progress
    shown = held_out.state_dict()
    held_out.reset()
    done.current.completed -= 1
    done.total.completed -= 1
    try:
        yield
    finally:
        done.current.completed += 1
        done.total.completed += 1
        held_out.load_state_dict(shown)


def _keep_alive() -> None:
    """Lightning's launcher kills its own process as soon as a rank that it launched has ended with a status but 0."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            with suppress(AttributeError):
                thread._child_processes = []  # type: ignore[attr-defined]
