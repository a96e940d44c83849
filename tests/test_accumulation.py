"""StepMean by numbers derived by hand. Its work under ranks: tests/test_two_ranks.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from halos_pl.accumulation import StepMean


class Step:
    """What the trainer does with `loss = weight · inputs` summed by StepMean, starting from weight 1."""

    def __init__(self) -> None:
        self.mean, self.weight = StepMean(), nn.Parameter(torch.ones((), dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(2))  # has no gradient

    def run(self, micro_batches: list[list[float]], accumulate: int) -> tuple[list[float], Tensor]:
        """The losses that were differentiated and the gradient of the step, as the optimizer sees it."""
        self.weight.grad = None
        losses = []
        for inputs in micro_batches:
            loss = self.mean.normalize(self.weight * torch.tensor(inputs, dtype=torch.float64))
            (loss / accumulate).backward()  # Lightning divides by the window, however short it turns out
            losses.append(loss.item())
        self.mean.rescale([self.weight, self.frozen], accumulate)
        assert self.weight.grad is not None
        return losses, self.weight.grad


@pytest.mark.parametrize(
    ("micro_batches", "accumulate", "losses", "gradient"),
    [
        ([[1, 2, 6]], 1, [3], 3),  # one micro-batch: the plain mean
        ([[1, 3], [2, 6]], 2, [2, 4], 3),  # even counts: the mean of means
        ([[1, 3], [2, 6, 8, 10]], 2, [2, 13], 30 / 6),  # uneven: 4/2 and 26/2; the mean of means would be 4.25
        ([[2, 6, 8, 10], [1, 3]], 2, [6.5, 1], 30 / 6),  # the order of the micro-batches does not matter
        ([[1, 3], [5]], 4, [2, 2.5], 3),  # a window cut after 2 of 4: (4 + 5) / 3, not 9 / (2 · 4)
        ([[7, 9]], 4, [8], 8),  # cut after 1 of 4
    ],
)
def test_gradient_is_the_mean_over_all_losses_of_the_step(
    micro_batches: list[list[float]], accumulate: int, losses: list[float], gradient: float
) -> None:
    seen, grad = Step().run(micro_batches, accumulate)
    assert seen == pytest.approx(losses, abs=1e-12)
    assert grad.item() == pytest.approx(gradient, abs=1e-12)


def test_each_step_starts_anew() -> None:
    step = Step()
    step.run([[1, 3], [2, 6, 8, 10]], 2)
    _, grad = step.run([[4, 8], [3]], 2)
    assert grad.item() == pytest.approx(5, abs=1e-12)


def test_even_counts_leave_the_gradients_untouched() -> None:
    """Bitwise: a factor of 1 is not multiplied with."""
    step = Step()
    step.mean.normalize(torch.zeros(3))
    step.mean.normalize(torch.zeros(3))
    step.weight.grad = grad = torch.full((), 0.1, dtype=torch.float64)
    version = grad._version
    step.mean.rescale([step.weight], 2)
    assert grad._version == version


def test_rescaling_without_a_loss_does_nothing() -> None:
    step = Step()
    step.weight.grad = torch.ones((), dtype=torch.float64)
    step.mean.rescale([step.weight], 2)
    assert step.weight.grad == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_keeps_its_dtype(dtype: torch.dtype) -> None:
    assert StepMean().normalize(torch.ones(3, dtype=dtype)).dtype == dtype
