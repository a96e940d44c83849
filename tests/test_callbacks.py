"""What a run tells its user beyond the files it leaves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from halos_pl.callbacks import ProgressBar, balance
from halos_pl.losses import KTO


@pytest.mark.parametrize(
    ("weights", "up", "down", "told"),
    [
        ((1.0, 1.0), 50, 50, "1.00 times the undesirable ones"),
        ((4 / 3, 1.0), 50, 50, "1.33 times the undesirable ones"),
        ((1.0, 1.0), 90, 30, "3.00 times the undesirable ones; the paper advises 1 to 4/3"),
        ((1.0, 3.0), 90, 30, "1.00 times the undesirable ones"),
        ((1.0, 1.0), 30, 90, "0.33 times the undesirable ones; the paper advises"),
        ((1.0, 1.0), 90, 0, "one class has no weight"),
        ((0.0, 1.0), 90, 30, "one class has no weight"),
    ],
)
def test_balance(weights: tuple[float, float], up: int, down: int, told: str) -> None:
    line = balance(KTO(desirable_weight=weights[0], undesirable_weight=weights[1]), np.arange(up + down) < up)
    assert told in line
    assert ("advises" in told) == ("advises" in line)


def test_the_bar_shows_the_last_logged_values() -> None:
    """Callbacks are told of a step before the module logs it: what they read then is the step logged before."""
    bar = ProgressBar()
    trainer: Any = SimpleNamespace(global_step=0, log_every_n_steps=10, callback_metrics={})
    shown = []
    for step in range(1, 32):
        trainer.global_step = step
        shown.append(bar.get_metrics(trainer, None).get("loss"))  # type: ignore[arg-type]
        if step % 10 == 0:
            trainer.callback_metrics = {"train/loss": torch.tensor(float(step))}
    assert shown == [None] * 10 + ["10"] * 10 + ["20"] * 10 + ["30"]
