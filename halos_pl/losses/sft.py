"""Supervised fine-tuning: learning from demonstrations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from halos_pl.batch import CompletionLogps, View
from halos_pl.losses.objective import Objective, Unit, check_floating


def sft_loss(token_logp: Tensor) -> Tensor:
    """Negative log-likelihood of each completion token.

        loss = −token_logp

    Its mean over the tokens of an optimizer step is −Σ token_logp / Σ tokens, whatever the micro-batches and ranks.

    Args:
        token_logp: [N] log-probabilities of the scored tokens in nats.

    Returns:
        [N] losses in the input's dtype.

    Raises:
        ValueError: if the input is not floating point.

    Example:
        >>> import torch
        >>> sft_loss(torch.tensor([-0.5, -2.0])).tolist()
        [0.5, 2.0]
    """
    check_floating(token_logp=token_logp)
    return -token_logp


@dataclass(frozen=True)
class SFT(Objective):
    """Supervised fine-tuning: the mean negative log-likelihood of completion tokens (see `sft_loss`)."""

    view: ClassVar[View] = "sft"
    unit: ClassVar[Unit] = "token"
    needs_reference: ClassVar[bool] = False

    def losses(self, scores: CompletionLogps, desirable: Tensor | None = None, z0: Tensor | None = None) -> Tensor:
        return sft_loss(scores.token_logp)

    def rewards(self, scores: CompletionLogps) -> None:
        """Demonstrations imply no reward."""
        return
