"""Supervised fine-tuning: learning from demonstrations, or from labelled completions under control tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from halos_pl.batch import CompletionLogps, View
from halos_pl.losses.checks import check_floating
from halos_pl.losses.objective import Objective, Unit


def sft_loss(token_logp: Tensor) -> Tensor:
    """Negative log-likelihood of each completion token.

        loss = −token_logp

    Its mean over the tokens of an optimizer step is −Σ token_logp / Σ tokens, whatever the micro-batches and ranks.

    Args:
        token_logp: [N] log-probabilities of the scored tokens in nats.

    Returns:
        [N] losses in the input's dtype.

    Raises:
        ValueError: if the input is not floating point, or NaN.

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
    formula: ClassVar[str] = "−log π of each token"
    source: ClassVar[str] = "maximum likelihood"

    def losses(self, scores: CompletionLogps, desirable: Tensor | None = None, z0: Tensor | None = None) -> Tensor:
        return sft_loss(scores.token_logp)

    def rewards(self, scores: CompletionLogps) -> None:
        """Demonstrations imply no reward."""
        return


@dataclass(frozen=True)
class CSFT(SFT):
    """Conditional supervised fine-tuning: SFT on good and bad completions alike, each after a control text that ends
    its prompt and is not scored (KTO report, section 6; Korbak et al. 2023). Sampling, and the chat template that is
    exported, end the prompt with the good one.

    Args:
        good: Ends the prompts of desirable completions. Where the tokenizer has it as a token it is that token; no
            embedding is added otherwise: it is then several ordinary ones.
        bad: Ends the prompts of undesirable completions.
    """

    view: ClassVar[View] = "unpaired"
    formula: ClassVar[str] = "−log π of each token, after a token for good or bad"
    source: ClassVar[str] = "Korbak et al. 2023; KTO report §6"

    good: str = "<|good|>"
    bad: str = "<|bad|>"

    def __post_init__(self) -> None:
        for name in ("good", "bad"):
            if not isinstance(value := getattr(self, name), str) or not value.strip():
                raise ValueError(f"{name} must be a text, got {value!r}")
        if self.good == self.bad:
            raise ValueError(f"good and bad must differ, got {self.good!r} for both")

    @property
    def control(self) -> tuple[str, str]:
        return self.good, self.bad
