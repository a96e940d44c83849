"""From tokenized examples to typed batches. What a device would have to search for is computed here, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from halos_pl.batch import Batch, PairedBatch, Sequences, SFTBatch, UnpairedBatch, View
from halos_pl.data.pairing import mismatch
from halos_pl.data.records import DataError, Origin
from halos_pl.data.truncation import Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A tokenized completion after its prompt, cut to size. Equal keys mean equal raw prompts (with tools) or
    completions, whatever was cut off."""

    prompt: Tokens
    completion: Tokens
    desirable: bool | None
    prompt_key: int
    completion_key: int
    origin: Origin
    score: float | None = None


class Item(NamedTuple):
    """What the dataset hands to the collator: one example or a pair, and y′ for each where the data module pairs."""

    examples: tuple[Example, ...]
    mismatched: tuple[Tokens, ...] | None = None


@dataclass(frozen=True)
class Collator:
    """Builds the batch of a view.

    Args:
        view: how the objective reads feedback. Pairs become `PairedBatch` whatever the view: an unpaired objective can
            be validated on them.
        pad_id: token id of the padding; it is never scored, and no real token sees it.
        vocab_size: rows of the model's head; a larger token id raises.
        max_length: rows (x, y′) are cut at their end to this many tokens.
        pad_to_multiple_of: padded lengths are rounded up to it.
        length_groups: blocks of rows of like length.
        pair_in_batch: y′ from the same micro-batch (the paper's way) where the items bring none.
        scores: hand on the scores of unpaired rows; each must have one.
        same_blocks: as many blocks in every batch, however few its rows: sharded models gather their layers once a
            block, and ranks must do so equally often.
    """

    view: View
    pad_id: int
    vocab_size: int
    max_length: int
    pad_to_multiple_of: int = 1
    length_groups: int = 1
    pair_in_batch: bool = False
    scores: bool = False
    same_blocks: bool = False

    def __call__(self, items: Sequence[Item]) -> Batch:
        columns = list(zip(*(item.examples for item in items), strict=True))
        examples = [example for column in columns for example in column]  # chosen rows first, then rejected
        completions = self._sequences([(e.prompt, e.completion) for e in examples])
        mismatched = None
        if self.pair_in_batch:
            mismatched = self._sequences(_pair_in_batch(examples))
        elif items[0].mismatched is not None:
            partners = [y for column in zip(*(item.mismatched or () for item in items), strict=True) for y in column]
            mismatched = self._sequences([(e.prompt, y) for e, y in zip(examples, partners, strict=True)])
        if len(columns) == 2:
            return PairedBatch(completions, mismatched)
        if self.view == "sft":
            return SFTBatch(completions)
        desirable = torch.tensor([bool(e.desirable) for e in examples])
        score = torch.tensor([e.score for e in examples], dtype=torch.float32) if self.scores else None
        return UnpairedBatch(completions, mismatched, desirable=desirable, score=score)

    def _sequences(self, rows: Sequence[tuple[Tokens, Tokens]]) -> Sequences:
        rows = [(prompt, completion[: self.max_length - len(prompt)]) for prompt, completion in rows]
        return sequences(
            rows,
            pad_id=self.pad_id,
            vocab_size=self.vocab_size,
            pad_to_multiple_of=self.pad_to_multiple_of,
            max_width=self.max_length,
            length_groups=self.length_groups,
            same_blocks=self.same_blocks,
        )


def sequences(
    rows: Sequence[tuple[Tokens, Tokens]],
    *,
    pad_id: int,
    vocab_size: int,
    pad_to_multiple_of: int = 1,
    max_width: int | None = None,
    length_groups: int = 1,
    same_blocks: bool = False,
) -> Sequences:
    """Rows of (prompt, completion) with every completion token scored.

    Args:
        rows: token ids.
        pad_id: fills up a block on the right.
        vocab_size: bound of the ids.
        pad_to_multiple_of: of a block's length, unless that passes `max_width`.
        max_width: positions of the model.
        length_groups: blocks, each of as many rows, sorted by length: less padding, one forward pass each.
        same_blocks: with fewer rows than groups, blocks of one padded position make up for the others.

    Raises:
        ValueError: an id outside [0, vocab_size), an empty prompt (its completion's first token would be predicted
            from nothing) or an empty completion.
    """
    for r, (x, y) in enumerate(rows):
        if not len(x) or not len(y):
            raise ValueError(f"row {r} has {len(x)} prompt and {len(y)} completion tokens; both need at least one")
    tokens = [np.concatenate(row).astype(np.int64) for row in rows]
    if (worst := max(row.max() for row in tokens)) >= vocab_size or (worst := min(row.min() for row in tokens)) < 0:
        raise ValueError(f"token id {worst} outside the model's vocabulary of {vocab_size}")
    lengths = np.array([len(row) - 1 for row in tokens])  # the last token is only predicted
    scored = np.array([len(y) for _, y in rows])
    blocks, place = [], np.empty_like(lengths)  # place of a row's first token among the positions of all blocks
    end = 0
    for group in np.array_split(np.argsort(lengths, kind="stable"), min(length_groups, len(rows))):
        longest = int(lengths[group].max())
        width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
        width = max(longest, min(width, max_width or width))
        block = np.full((len(group), width), pad_id, np.int64)
        block[np.arange(width) < lengths[group, None]] = np.concatenate([tokens[r][:-1] for r in group])
        place[group] = end + width * np.arange(len(group))
        end += block.size
        blocks.append(torch.from_numpy(block))
    if same_blocks:
        blocks += [torch.full((1, 1), pad_id) for _ in range(length_groups - len(blocks))]
    starts = np.concatenate([[0], np.cumsum(scored)])
    first = place + lengths - scored  # a row's last prompt token predicts its first completion token
    return Sequences(
        blocks=tuple(blocks),
        predictors=torch.from_numpy(np.repeat(first - starts[:-1], scored) + np.arange(starts[-1])),
        targets=torch.from_numpy(np.concatenate([y for _, y in rows]).astype(np.int64)),
        cu_seqlens=torch.from_numpy(starts),
        num_tokens=int(lengths.sum()) + len(rows),
    )


def _pair_in_batch(examples: Sequence[Example]) -> list[tuple[Tokens, Tokens]]:
    try:
        partner, _ = mismatch([e.prompt_key for e in examples], [e.completion_key for e in examples], seed=0)
    except ValueError as error:
        raise DataError(
            f"{examples[error.args[1]].origin}: no other row of its micro-batch of {len(examples)} has another prompt "
            "with another completion to serve as y′; use a larger batch_size or `--data.mismatch dataset`"
        ) from None
    return [(e.prompt, examples[j].completion) for e, j in zip(examples, partner, strict=True)]
