"""Rows that are longer than the model may read: what is cut off, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Sizes = NDArray[np.int64]


@dataclass(frozen=True)
class TruncationReport:
    """How many rows were longer than `max_length`, and where they were cut (a row may be cut at both places)."""

    rows: int
    truncated: int
    prompts: int
    completions: int

    def __str__(self) -> str:
        return (
            f"{self.truncated:,} of {self.rows:,} rows were truncated "
            f"({self.prompts:,} prompts cut on the left, {self.completions:,} completions cut at the end)"
        )


@dataclass(frozen=True)
class Truncation:
    """A longer row's prompt is cut on its left, to `max_prompt_length` or what the completion leaves free; then the
    completion is cut at its end.

    Args:
        max_length: tokens of prompt, control and completion together.
        max_prompt_length: tokens of prompt and control that a long completion leaves, at least.
        lead: ids at the start of a prompt that stay (BOS).
    """

    max_length: int
    max_prompt_length: int
    lead: Sequence[int] = ()

    def sizes(self, prompt: Any, completion: Any, control: Any = 0) -> tuple[Sizes, Sizes]:
        """Tokens to keep of prompts (without their control) and of completions, int64 of the arguments' shape."""
        size, whole = np.asarray(prompt) + control, np.asarray(completion)
        long = (size + whole > self.max_length) & (size > self.max_prompt_length)
        least = np.maximum(self.max_prompt_length, self.max_length - whole)
        size = np.where(long, np.minimum(size, least), size)
        return size - control, np.minimum(whole, self.max_length - size)

    def prompt(self, ids: Tokens, size: int) -> Tokens:
        """The end of a prompt, `size` tokens with its BOS before it."""
        if size >= len(ids):
            return ids
        lead = np.array(self.lead[:size], ids.dtype)
        if not np.array_equal(ids[: len(self.lead)], self.lead):
            lead = lead[:0]
        return np.concatenate([lead, ids[len(ids) - size + len(lead) :]])

    def report(self, prompt: Any, completion: Any, control: Any = 0) -> TruncationReport:
        """Of rows with these numbers of tokens."""
        before, after = self.sizes(prompt, completion, control)
        cut = before < prompt, after < completion
        return TruncationReport(len(before), int((cut[0] | cut[1]).sum()), int(cut[0].sum()), int(cut[1].sum()))
