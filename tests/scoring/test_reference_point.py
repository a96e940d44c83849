"""z0: a global mean, clamped after it, detached. Uneven ranks: tests/test_two_ranks.py."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from halos_pl.data import AlignmentData
from halos_pl.losses import BCO
from halos_pl.module import AlignmentModule
from halos_pl.scoring import RunningMean, global_mean, reference_point


@pytest.mark.parametrize(
    ("ratios", "mean"),
    [
        ([2.0, -1.0, -1.0, 4.0], 1.0),  # a mean of clamped terms would be 1.5
        ([3.0, 0.0, 0.0], 1.0),  # true zeros count: without them it would be 3
        ([-3.0, 1.0], -1.0),
        ([0.0, 0.0], 0.0),
        ([], 0.0),
    ],
)
def test_mean_then_clamp(ratios: list[float], mean: float) -> None:
    values = torch.tensor(ratios, dtype=torch.float64)
    assert global_mean(values) == mean
    assert reference_point(values) == max(0.0, mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("f", [global_mean, reference_point])
def test_scalar_in_the_dtype_of_its_input_and_detached(f, dtype) -> None:
    ratios = torch.tensor([0.5, 1.5], dtype=dtype, requires_grad=True)
    z0 = f(ratios * 2)
    assert z0.shape == ()
    assert z0.dtype == dtype
    assert not z0.requires_grad
    assert z0 == 2


def test_summed_wider_than_float32() -> None:
    ratios = torch.tensor([1e8, 1.0, -1e8, 3.0])
    assert global_mean(ratios) == 1.0


def test_other_shapes_are_refused() -> None:
    for shape in ((), (2, 3)):
        with pytest.raises(ValueError, match=r"must have shape \[M\], got"):
            reference_point(torch.zeros(shape))


def test_docstring_examples() -> None:
    result = doctest.testmod(importlib.import_module("halos_pl.scoring.reference_point"))
    assert result.attempted
    assert not result.failed


# -------------------------------------------------------------------------------------------------- running mean


def test_the_running_mean_is_of_all_values_not_of_batches() -> None:
    mean = RunningMean()
    seen = [mean(torch.tensor(x, dtype=torch.float64)).item() for x in ([1.0, 3.0], [-10.0], [0.0, 0.0, 0.0], [])]
    assert seen == [2.0, -2.0, -1.0, -1.0], "with the batch at hand; never clamped"


def test_only_training_adds() -> None:
    mean = RunningMean()
    mean.eval()
    assert mean(torch.tensor([5.0])) == 0, "nothing was seen"
    assert mean.train()(torch.tensor([5.0, 1.0])) == 3
    assert mean.eval()(torch.tensor([100.0])) == 3
    assert (mean.total.item(), mean.count.item()) == (6, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_running_mean_is_a_detached_scalar(dtype: torch.dtype) -> None:
    mean = RunningMean()
    values = torch.tensor([0.5, 1.5], dtype=dtype, requires_grad=True)
    for z0 in (mean(values * 2), mean.eval()(values * 2)):
        assert z0.shape == ()
        assert z0.dtype == dtype
        assert not z0.requires_grad
        assert z0 == 2
    assert not mean.total.requires_grad
    assert not [*mean.parameters()]


def test_the_running_mean_is_summed_in_float64() -> None:
    mean = RunningMean()
    mean(torch.tensor([1e8, 1.0]))
    assert mean(torch.tensor([-1e8, 3.0])) == 1
    for _ in range(1000):
        mean(torch.full((8,), 0.1, dtype=torch.bfloat16))
    step = torch.tensor(0.1, dtype=torch.bfloat16).double().item()
    assert mean.total.item() == pytest.approx(4 + 8000 * step, rel=1e-12)
    assert mean.count == 8004


def test_the_running_mean_is_part_of_the_state() -> None:
    mean, other = RunningMean(), RunningMean()
    mean(torch.tensor([1.0, 2.0]))
    state = mean.state_dict()
    assert {name: (x.item(), x.dtype) for name, x in state.items()} == {
        "total": (3.0, torch.float64),
        "count": (2.0, torch.float64),
    }
    other.load_state_dict(state)
    assert other(torch.tensor([6.0])) == 3


def test_a_checkpoint_brings_the_running_mean_back(tiny_model: Path, thumbs_file: Path, tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> tuple[AlignmentModule, L.Trainer]:
        module = AlignmentModule(
            BCO(beta=0.5),
            policy=str(tiny_model),
            dtype="float64",
            optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
            schedule="constant",
            warmup=0,
        )
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=AlignmentData(train=str(thumbs_file), batch_size=32), **options)
        return module, trainer

    whole, _ = fit(2)
    first, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert first.running_mean is not None
    assert state["running_mean.total"] == first.running_mean.total != 0
    assert state["running_mean.count"] == 96
    resumed, _ = fit(2, ckpt_path=tmp_path / "one.ckpt")
    for module in (whole, resumed):
        assert module.running_mean is not None
        assert module.running_mean.count == 192
    assert resumed.running_mean.total.item() == pytest.approx(whole.running_mean.total.item(), rel=1e-12)  # type: ignore[union-attr]
