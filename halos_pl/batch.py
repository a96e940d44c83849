"""Typed carriers between the layers: what the data hand to the step, and what scoring hands to the losses.

Shape legend, used everywhere in the project:

    B  examples (or pairs) of a micro-batch     R  token rows: B, or 2B for pairs (chosen rows first, then rejected)
    T  padded length of a row in its block      N  scored tokens of all rows (completion tokens, EOS included)
    M  mismatched rows (x, y′)                  V  vocabulary size            d  hidden size

Log-probabilities are in nats; a sequence's log-probability is the sum over its scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

View = Literal["unpaired", "paired", "sft"]
"""How an objective reads feedback: single labelled completions, preference pairs, or demonstrations."""

_T = TypeVar("_T", bound="_Carrier")


@dataclass(frozen=True)
class _Carrier:
    """A tree of tensors that moves as one (Lightning and the DataLoader call `to` and `pin_memory`)."""

    def _map(self: _T, f: Callable[[Tensor], Tensor]) -> _T:
        def apply(value: object) -> object:
            if isinstance(value, Tensor):
                return f(value)
            if isinstance(value, tuple):
                return tuple(map(apply, value))
            return value._map(f) if isinstance(value, _Carrier) else value

        return replace(self, **{x.name: apply(getattr(self, x.name)) for x in fields(self)})

    def to(self: _T, device: torch.device | str, non_blocking: bool = False) -> _T:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self: _T) -> _T:
        return self._map(lambda t: t.pin_memory())


@dataclass(frozen=True)
class Sequences(_Carrier):
    """Token rows and, built on the host, the place of every scored token, so that the device never searches for them.

    Row r owns the scored tokens `cu_seqlens[r] : cu_seqlens[r + 1]`. Rows of like length lie together in a block and
    are padded on the right; a row's last token is only predicted, so it is not among the inputs. There is no attention
    mask: in a causal model no real token sees what lies to its right.
    """

    blocks: tuple[Tensor, ...]  # each [R_g, T_g] int64, ΣR_g = R
    predictors: Tensor  # [N] int64: into the positions of all blocks in a line, the one whose hidden state predicts
    targets: Tensor  # [N] int64
    cu_seqlens: Tensor  # [R + 1] int64, starts at 0
    num_tokens: int  # unpadded, prompts and last tokens included

    @property
    def num_rows(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_scored(self) -> int:
        return self.targets.shape[0]


@dataclass(frozen=True)
class Batch(_Carrier):
    """What every objective gets: completions to score and, for the reference point, mismatched rows (x, y′)."""

    completions: Sequences  # R rows
    mismatched: Sequences | None = None  # M rows; None where no reference point is needed

    @property
    def num_examples(self) -> int:
        return self.completions.num_rows


@dataclass(frozen=True)
class SFTBatch(Batch):
    """Demonstrations: one row an example."""


@dataclass(frozen=True, kw_only=True)
class UnpairedBatch(Batch):
    """Single completions with a thumbs-up or thumbs-down."""

    desirable: Tensor  # [B] bool
    score: Tensor | None = None  # [B] float32: rewards of the data, where the objective asks for them


@dataclass(frozen=True)
class PairedBatch(Batch):
    """B preference pairs as 2B rows: row b is chosen, row B + b is rejected."""

    @property
    def num_examples(self) -> int:
        return self.completions.num_rows // 2

    @property
    def desirable(self) -> Tensor:
        """[2B] bool: what an unpaired objective sees of the pairs."""
        rows = torch.arange(self.completions.num_rows, device=self.completions.targets.device)
        return rows < self.num_examples


@dataclass(frozen=True)
class CompletionLogps(_Carrier):
    """Scores of R completions. Without a reference `logratio` is `logp` and the reference fields are None."""

    logratio: Tensor  # [R] policy − reference, summed over the completion
    logp: Tensor  # [R] policy
    length: Tensor  # [R] int64 scored tokens, EOS included
    token_logp: Tensor  # [N] policy
    ref_logp: Tensor | None = None  # [R]
    token_logratio: Tensor | None = None  # [N]
    entropy: Tensor | None = None  # [N] of the policy's next-token distribution, where asked for
    value: Tensor | None = None  # [N] by the value head, where there is one: expected return from the token on
    score: Tensor | None = None  # [R] rewards of the data, where the objective asks for them

    def pairs(self) -> tuple[CompletionLogps, CompletionLogps]:
        """Chosen and rejected halves of 2B rows (sequence-level fields only; the token fields stay whole)."""
        if self.logp.shape[0] % 2:
            raise ValueError(f"pairs need an even number of rows, got {self.logp.shape[0]}")
        halves = []
        for half in (0, 1):
            cut = {
                x: value.chunk(2)[half]
                for x in ("logratio", "logp", "length", "ref_logp")
                if (value := getattr(self, x)) is not None
            }
            halves.append(replace(self, **cut))
        return halves[0], halves[1]


@dataclass(frozen=True)
class DataNeeds:
    """What the module tells the data module, so that the two cannot disagree."""

    view: View
    mismatched: bool  # rows (x, y′) for the reference point
    tokenizer: str  # folder or hub name, unless the data module names its own
    vocab_size: int  # rows of the smaller head of policy and reference
    max_positions: int | None  # of the shorter of the two; None where no configuration sets a limit
    reference: str | None = None  # folder or hub name, where it is another than the policy's
    trust_remote_code: bool = False
    control: tuple[str, str] | None = None  # ends the prompts of desirable and of undesirable completions (CSFT)
    scores: bool = False  # every row brings its reward, a number under the key `score`
    equal_halves: bool = False  # every micro-batch holds as many desirable as undesirable rows (KTO v1)
