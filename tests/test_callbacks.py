"""What a run tells its user beyond the files it leaves."""

from __future__ import annotations

import re
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
        (
            (1.0, 1.0),
            90,
            30,
            "warning: desirable rows weigh 3.00 times the undesirable ones (λ_D n_D / (λ_U n_U)); the paper advises 1 "
            "to 4/3: --model.objective.undesirable_weight 2.25 to 3 (with desirable_weight 1)",
        ),
        (
            (1.0, 1.0),
            20,
            80,
            "warning: desirable rows weigh 0.25 times the undesirable ones (λ_D n_D / (λ_U n_U)); the paper advises 1 "
            "to 4/3: --model.objective.desirable_weight 4 to 5.33 (with undesirable_weight 1); below 1 is a choice for "
            "preventing harm",
        ),
        ((0.5, 2.0), 50, 50, "the paper advises 1 to 4/3: --model.objective.desirable_weight 2 to 2.66 (with undesir"),
        ((2.0, 0.001), 50, 50, "advises 1 to 4/3: --model.objective.undesirable_weight 1.5 to 2 (with desirable_wei"),
        ((1.0, 1.0), 5000, 3, "advises 1 to 4/3: --model.objective.undesirable_weight 1250 to 1660 (with desirable"),
        ((1.0, 1.0), 995, 1000, "balance: desirable rows weigh 0.99 times the undesirable ones"),
        ((1.0, 1.0), 980, 1000, "0.98 times the undesirable ones (λ_D n_D / (λ_U n_U)); the paper advises"),
        ((1.0, 1.0), 1340, 1000, "balance: desirable rows weigh 1.34 times"),
        ((1.0, 1.0), 1350, 1000, "1.35 times the undesirable ones (λ_D n_D / (λ_U n_U)); the paper advises"),
        ((1.0, 3.0), 90, 30, "1.00 times the undesirable ones"),
        ((1.0, 1.0), 30, 90, "0.33 times the undesirable ones (λ_D n_D / (λ_U n_U)); the paper advises"),
        ((1.0, 1.0), 90, 0, "one class has no weight"),
        ((0.0, 1.0), 90, 30, "one class has no weight"),
    ],
)
def test_balance(weights: tuple[float, float], up: int, down: int, told: str) -> None:
    line = balance(KTO(desirable_weight=weights[0], undesirable_weight=weights[1]), np.arange(up + down) < up)
    assert told in line
    assert ("advises" in told) == ("advises" in line) == line.startswith("warning: ")


@pytest.mark.parametrize("counts", [(1, 3), (7, 90), (90, 7), (999, 1001 * 7), (10**5, 3), (1, 10**6), (49, 36)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.7), (2.5, 1e-3)])
def test_recommended_weights_land_in_the_range(counts: tuple[int, int], weights: tuple[float, float]) -> None:
    """For any objective with two weights."""
    objective = SimpleNamespace(desirable_weight=weights[0], undesirable_weight=weights[1])
    desirable = np.arange(sum(counts)) < counts[0]
    line = balance(objective, desirable)
    found = re.search(r"objective\.(\w+) (\S+) to (\S+) \(", line)
    assert found
    for advised in found.groups()[1:]:
        assert len(advised.replace(".", "").strip("0")) <= 3 or "e" in advised
        mended = SimpleNamespace(**(vars(objective) | {found[1]: float(advised)}))
        up, down = mended.desirable_weight * counts[0], mended.undesirable_weight * counts[1]
        assert 1 - 1e-9 <= up / down <= 4 / 3 + 1e-9


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
