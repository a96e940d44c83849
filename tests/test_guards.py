"""A run whose numbers are not finite stops, or leaves the step out; memory that runs out says what to lower."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from halos_pl.data import AlignmentData
from halos_pl.guards import Guards
from halos_pl.losses import BCO, KTO, Objective
from halos_pl.models import ModelError
from halos_pl.module import AlignmentModule


class Poison(L.Callback):
    """Makes loss or gradient of some micro-batches (counted from 1) NaN or infinite."""

    def __init__(self, at: dict[int, str]) -> None:
        self.at, self.count, self.looked = at, 0, 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.count += 1
        self.what = self.at.get(self.count, "")
        if not hasattr(pl_module, "unharmed"):
            pl_module.unharmed = pl_module.score
            pl_module.score = lambda *args, **kwargs: self.scores(pl_module.unharmed(*args, **kwargs))

    def scores(self, scores: Any) -> Any:
        from dataclasses import replace

        return replace(scores, logratio=scores.logratio * math.nan) if self.what == "loss" else scores

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.what == "gradient":
            next(p for p in pl_module.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf


class State(L.Callback):
    """Weights and optimizer after each step, and the learning rate it was taken with."""

    def __init__(self) -> None:
        self.after: list[list[Tensor]] = []
        self.rates: list[float] = []
        self.rows: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        inner = [x for s in trainer.optimizers[0].state.values() for x in s.values() if isinstance(x, Tensor)]
        self.after.append([x.detach().clone() for x in [*pl_module.parameters(), *pl_module.buffers(), *inner]])


class Rows(L.pytorch.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(name.startswith("train/") for name in metrics):
            self.rows.append(metrics)


def train(
    model: Path, file: Path, *callbacks: L.Callback, objective: Objective | None = None, **options: Any
) -> tuple[AlignmentModule, Rows]:
    module = AlignmentModule(
        objective or KTO(beta=0.5),
        policy=str(model),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        schedule="linear",
        warmup=0,
    )
    rows = Rows()
    settings = {"max_steps": 6, "log_every_n_steps": 2, "gradient_clip_val": 1.0, "enable_checkpointing": False}
    trainer = L.Trainer(
        accelerator="cpu",
        logger=rows,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**settings, **options},
    )
    trainer.fit(module, datamodule=AlignmentData(train=str(file), batch_size=8))
    return module, rows


# ------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("objective", [KTO(beta=0.5), BCO(beta=0.5)], ids=["kto", "bco"])
def test_a_skipped_step_leaves_no_trace(what: str, objective: Objective, tiny_model: Path, thumbs_file: Path) -> None:
    """Bit for bit: weights, moments, BCO's running mean and averages; only the schedule goes on."""
    state, guards = State(), Guards("skip")
    _, rows = train(tiny_model, thumbs_file, state, Poison({3: what}), guards, objective=objective)
    assert all(torch.equal(a, b) for a, b in zip(state.after[1], state.after[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(state.after[2], state.after[3], strict=True))
    assert [row["train/skipped"] for row in rows.rows] == [0, 1, 1]
    assert all(math.isfinite(value) for row in rows.rows for value in row.values())
    assert state.rates == pytest.approx([1e-2 * (1 - k / 6) for k in range(6)])

    _, alone = train(
        tiny_model, thumbs_file, Poison({3: what}), Guards("skip"), objective=objective, log_every_n_steps=1
    )
    assert rows.rows[1]["train/loss"] == pytest.approx(alone.rows[3]["train/loss"], abs=1e-12), "step 4's"
    assert rows.rows[1]["train/grad_norm"] == pytest.approx(alone.rows[3]["train/grad_norm"], abs=1e-12)


def test_a_window_is_skipped_whole(tiny_model: Path, thumbs_file: Path) -> None:
    state, guards = State(), Guards("skip")
    train(tiny_model, thumbs_file, state, Poison({3: "loss"}), guards, accumulate_grad_batches=2, max_steps=3)
    assert all(torch.equal(a, b) for a, b in zip(state.after[1], state.after[3], strict=True))
    assert guards.skipped == 1


def test_a_run_skips_so_many_steps_and_no_more(tiny_model: Path, thumbs_file: Path, tmp_path: Path) -> None:
    guards = Guards("skip", max_skipped=1)
    with pytest.raises(ModelError, match=r"the gradient is not finite, after 1 skipped steps .* at step 5: lower"):
        train(tiny_model, thumbs_file, Poison({2: "loss", 5: "gradient"}), guards)
    again = Guards("skip", max_skipped=1)
    again.load_state_dict(guards.state_dict())
    with pytest.raises(ModelError, match="at step 1"):
        train(tiny_model, thumbs_file, Poison({1: "gradient"}), again)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"log_every_n_steps": 4}, 4), ({"log_every_n_steps": 50}, 6), ({"log_every_n_steps": 0}, 6)],
    ids=["a logged step", "the end", "no logs"],
)
def test_stop_is_found_without_waiting_at_each_step(
    options: dict[str, Any], steps: int, tiny_model: Path, thumbs_file: Path
) -> None:
    """The message names the step where it happened."""
    state = State()
    with pytest.raises(ModelError, match=r"the gradient is not finite at step 2: lower"):
        train(tiny_model, thumbs_file, state, Guards(), Poison({2: "gradient"}), objective=BCO(), **options)
    assert len(state.after) == steps


class Save(L.Callback):
    def __init__(self, path: Path, steps: tuple[int, ...]) -> None:
        self.path, self.steps = path, steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.path / f"{trainer.global_step}.ckpt")


def test_what_is_not_finite_is_never_saved(tiny_model: Path, thumbs_file: Path, tmp_path: Path) -> None:
    kept = Save(tmp_path, (1, 3))
    with pytest.raises(ModelError, match="the gradient is not finite at step 2"):
        train(tiny_model, thumbs_file, Guards(), Poison({2: "gradient"}), kept, log_every_n_steps=50)
    assert [x.name for x in tmp_path.iterdir()] == ["1.ckpt"]

    class Burst(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            with torch.no_grad():
                next(iter(pl_module.policy.parameters())).view(-1)[0] = math.nan

    with pytest.raises(ModelError, match="the weights are not finite"):
        train(tiny_model, thumbs_file, Guards(), Burst(), Save(tmp_path, (1,)), log_every_n_steps=50)


def test_the_device_is_asked_at_logged_steps_only(
    tiny_model: Path, thumbs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    guards = Guards()
    monkeypatch.setattr(guards, "look", lambda: looks.append(guards._module.global_step))
    train(tiny_model, thumbs_file, guards, log_every_n_steps=3)
    assert looks == [3, 6, 6], "and at the end"


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"guards.max_skipped must be at least 0"):
        Guards(max_skipped=-1)
    with pytest.raises(ValueError, match=r"guards.timeout must be a finite number of minutes > 0"):
        Guards(timeout=0)


# ------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass of the third micro-batch finds no memory."""
    calls: list[int] = []

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            calls.append(1)
            if len(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …")
            return g

    step = AlignmentModule.training_step
    monkeypatch.setattr(AlignmentModule, "training_step", lambda *args: Fails.apply(step(*args)))


@pytest.mark.usefixtures("no_memory")
def test_memory_that_runs_out_names_the_batch(tiny_model: Path, thumbs_file: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError) as error:
        train(tiny_model, thumbs_file, Guards())
    told = str(error.value)
    assert "out of memory in step 3, a batch of 8 rows, " in told
    assert "8 rows (x, y′), " in told
    assert "2.50 GiB more were asked for" in told
    assert "--data.batch_size 4 (from 8) with --trainer.accumulate_grad_batches 2: as many rows a step" in told
    assert "--model.gradient_checkpointing true" in told
