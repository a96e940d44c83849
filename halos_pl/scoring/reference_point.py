"""The reference point z0 of prospect theory: what a completion is a gain or a loss against."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def global_mean(values: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean of [M] values over all ranks: global sum / global count, so that ranks may hold different counts, or none.

    Returns a 0-d tensor, detached, in the dtype of the values; summed in float64.
    """
    total, count = _global_sum(values, group)
    return (total / count.clamp_min(1)).to(values.dtype)


def reference_point(mismatched_logratio: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """z0 = max(0, mean of r(x, y′)): the KL between policy and reference, estimated on mismatched completions.

    Args:
        mismatched_logratio: [M] log-ratios of (x, y′) in nats, y′ the completion of another prompt.
        group: ranks to average over; default: all.

    Returns:
        0-d tensor, detached, never negative. KTO paper, equation 7 and section 4.1.

    Raises:
        ValueError: not one-dimensional.

    >>> reference_point(torch.tensor([0.5, 1.5]))
    tensor(1.)
    >>> reference_point(torch.tensor([-3.0, 1.0]))
    tensor(0.)
    """
    if mismatched_logratio.dim() != 1:
        raise ValueError(f"mismatched_logratio must have shape [M], got {tuple(mismatched_logratio.shape)}")
    return global_mean(mismatched_logratio, group=group).clamp_min(0)


class RunningMean(nn.Module):
    """Mean of all log-ratios seen so far, over all ranks: BCO's reference point (Jung et al. 2024, reward shift δ / β).

    Its sums are float64 buffers, so a checkpoint brings them back.
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def forward(self, logratio: Tensor) -> Tensor:
        """The 0-d mean in the dtype of `logratio` [B]; 0 before anything was seen. In training mode these values are
        added first."""
        if self.training:
            total, count = _global_sum(logratio)
            self.total += total
            self.count += count
        return (self.total / self.count.clamp_min(1)).to(logratio.dtype)


def _global_sum(values: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Sum and number of [M] values over all ranks, float64, detached."""
    values = values.detach()
    total = torch.stack([values.sum(dtype=torch.float64), values.new_tensor(values.numel(), dtype=torch.float64)])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total, group=group)
    return total[0], total[1]
