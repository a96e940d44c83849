"""Sampling in batches, the same whatever the batch: the noise of a token belongs to its seed, prompt and place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from halos_pl.data.truncation import Tokens
from halos_pl.models import ModelError


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        temperature: of the softmax; 0 takes the likeliest token every time.
        top_p: draw from the likeliest tokens that together have this probability.
        max_new_tokens: longer completions are cut there.
        seed: of the noise.
        batch_size: prompts at a time; the samples do not depend on it.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"max_new_tokens and batch_size must be at least 1, got {self.max_new_tokens} and {self.batch_size}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2**63, got {self.seed}")


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    how: Sampling,
    *,
    eos_token_id: int,
    pad_token_id: int,
    rows: Sequence[int] | None = None,
    generate: Callable[..., Tensor] | None = None,
    together: bool = False,
) -> list[Tokens]:
    """A completion for each prompt.

    A token is drawn by inverting the cumulative distribution (in float64) at a uniform number that is a function of
    (seed, row, place), so batch, order and ranks change nothing beyond the rounding of the logits.

    Args:
        model: in any mode; left as it is.
        prompts: token ids, none empty.
        how: temperature, lengths, seed.
        eos_token_id: ends a completion.
        pad_token_id: fills up shorter prompts on the left, unseen.
        rows: a number for each prompt that names its noise. Default: 0, 1, 2 …
        generate: the model's `generate`, by another way in.
        together: every rank samples as many prompts, and goes on until all have ended: a sharded model's layers are
            gathered for each token.

    Returns:
        token ids of each completion, its EOS included unless it was cut at `max_new_tokens`.

    Raises:
        ModelError: probabilities that are not finite.
    """
    rows = range(len(prompts)) if rows is None else rows
    out: list[Tokens] = [np.empty(0, np.int32)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
    training, settings = model.training, model.generation_config
    model.eval()
    # the model's own settings would fill whatever a call leaves open
    model.generation_config = GenerationConfig(
        do_sample=False,  # the last processor has drawn
        max_new_tokens=how.max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    try:
        for start in range(0, len(order), how.batch_size):
            batch = order[start : start + how.batch_size]
            ids, mask = _left_padded([prompts[i] for i in batch], pad_token_id, model.device)
            noise = torch.from_numpy(np.stack([_uniform(how, rows[i]) for i in batch])).to(model.device)
            draw: Any = generate or model.generate
            processors = _processors(how, noise, ids.shape[1])
            generated = draw(ids, attention_mask=mask, logits_processor=processors, synced_gpus=together)
            for i, tokens in zip(batch, generated[:, ids.shape[1] :].cpu().numpy().astype(np.int32), strict=True):
                ends = np.flatnonzero(tokens == eos_token_id)
                out[i] = tokens[: ends[0] + 1] if len(ends) else tokens
    finally:
        model.generation_config = settings
        model.train(training)
    return out


class _Draw(LogitsProcessor):
    """Leaves one token possible: the one that the uniform number of its row and place falls on."""

    def __init__(self, uniform: Tensor, prompt_length: int) -> None:
        self.uniform, self.prompt_length = uniform, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.double().softmax(-1).cumsum(-1)
        if not cumulative[:, -1].isfinite().all():
            raise ModelError("the model's probabilities are not finite numbers: did its training diverge?")
        at = self.uniform[:, input_ids.shape[1] - self.prompt_length, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, at, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _processors(how: Sampling, uniform: Tensor, prompt_length: int) -> LogitsProcessorList:
    if how.temperature == 0:
        return LogitsProcessorList()
    steps: list[LogitsProcessor] = [TemperatureLogitsWarper(how.temperature)] if how.temperature != 1 else []
    if how.top_p < 1:
        steps.append(TopPLogitsWarper(how.top_p))
    return LogitsProcessorList([*steps, _Draw(uniform, prompt_length)])


def _uniform(how: Sampling, row: int) -> NDArray[np.float64]:
    """[max_new_tokens] of [0, 1)."""
    return np.random.Generator(np.random.Philox(key=[how.seed, row])).random(how.max_new_tokens)


def _left_padded(prompts: Sequence[Tokens], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), pad_id, np.int64)
    mask = np.zeros((len(prompts), width), np.int64)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = prompt
        mask[i, width - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
