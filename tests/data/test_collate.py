"""Rows, places of the scored tokens and y′, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from halos_pl.batch import PairedBatch, SFTBatch, UnpairedBatch
from halos_pl.data.collate import Collator, Example, Item, sequences
from halos_pl.data.records import DataError, Origin
from halos_pl.data.truncation import Tokens


def tokens(*ids: int) -> Tokens:
    return np.array(ids, np.int32)


def example(prompt: Tokens, completion: Tokens, desirable: bool | None = True, row: int = 1) -> Example:
    return Example(
        prompt, completion, desirable, hash(prompt.tobytes()), hash(completion.tobytes()), Origin("f.jsonl", row)
    )


LENGTHS = [(3, 2), (1, 4), (7, 1), (2, 9), (1, 1), (4, 4), (5, 3)]
ROWS = [(tokens(5, 6, 7), tokens(8, 9)), (tokens(4), tokens(3, 2, 1, 2))]


def test_sequences_by_hand() -> None:
    rows = sequences(ROWS, pad_id=0, vocab_size=10)
    assert [block.tolist() for block in rows.blocks] == [[[5, 6, 7, 8], [4, 3, 2, 1]]], (
        "the last token is only predicted"
    )
    assert rows.predictors.tolist() == [2, 3, 4, 5, 6, 7], "the position before each scored token"
    assert rows.targets.tolist() == [8, 9, 3, 2, 1, 2]
    assert rows.cu_seqlens.tolist() == [0, 2, 6]
    assert rows.num_tokens == 10


def test_length_groups_by_hand() -> None:
    rows = sequences([ROWS[1], (tokens(1, 1), tokens(9)), ROWS[0]], pad_id=0, vocab_size=10, length_groups=2)
    assert [block.tolist() for block in rows.blocks] == [[[1, 1, 0, 0], [4, 3, 2, 1]], [[5, 6, 7, 8]]]
    assert rows.predictors.tolist() == [4, 5, 6, 7, 1, 10, 11], "row by row, wherever the rows lie"
    assert rows.targets.tolist() == [3, 2, 1, 2, 9, 8, 9]
    assert rows.cu_seqlens.tolist() == [0, 4, 5, 7]


@pytest.mark.parametrize("groups", [1, 2, 3, 50])
@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_layout_moves_nothing_that_is_scored(multiple: int, groups: int) -> None:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(1, 99, n).astype(np.int32), rng.integers(1, 99, m).astype(np.int32)) for n, m in LENGTHS]
    laid = sequences(rows, pad_id=0, vocab_size=99, pad_to_multiple_of=multiple, length_groups=groups)
    assert all(block.shape[1] % multiple == 0 for block in laid.blocks)
    assert len(laid.blocks) == min(groups, len(rows))
    line = torch.cat([block.flatten() for block in laid.blocks])
    before = [np.concatenate(row)[len(row[0]) - 1 : -1].tolist() for row in rows]
    assert line[laid.predictors].tolist() == [token for row in before for token in row]
    assert laid.targets.tolist() == [token for _, y in rows for token in y.tolist()]
    assert (line != 0).sum().item() == sum(n + m - 1 for n, m in LENGTHS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(tokens(1), tokens(10))], "token id 10 outside the model's vocabulary of 10"),
        ([(tokens(), tokens(1))], "row 0 has 0 prompt and 1 completion tokens"),
        ([(tokens(1), tokens(2)), (tokens(1), tokens())], "row 1 has 1 prompt and 0 completion tokens"),
    ],
)
def test_refuses_what_would_crash_a_device(rows: list[tuple[Tokens, Tokens]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequences(rows, pad_id=0, vocab_size=10)


def collator(view: str = "unpaired", **options: object) -> Collator:
    return Collator(view=view, pad_id=0, vocab_size=100, max_length=8, **options)  # type: ignore[arg-type]


def test_unpaired_batch() -> None:
    items = [
        Item((example(tokens(1, 2), tokens(3), True),), (tokens(7, 8),)),
        Item((example(tokens(4), tokens(5, 6), False),), (tokens(3),)),
    ]
    batch = collator()(items)
    assert isinstance(batch, UnpairedBatch)
    assert batch.desirable.tolist() == [True, False]
    assert batch.completions.targets.tolist() == [3, 5, 6]
    assert batch.mismatched is not None
    assert batch.mismatched.blocks[0].tolist() == [[4, 0, 0], [1, 2, 7]]
    assert batch.mismatched.targets.tolist() == [7, 8, 3]


def test_scores_come_where_they_are_asked_for() -> None:
    items = [Item((replace(example(tokens(1), tokens(2)), score=score),)) for score in (0.1, -2.0)]
    batch = collator(scores=True)(items)
    assert isinstance(batch, UnpairedBatch)
    assert batch.score is not None
    assert batch.score.dtype == torch.float32
    assert batch.score.tolist() == pytest.approx([0.1, -2.0])
    assert collator()(items).score is None  # type: ignore[attr-defined]


def test_mismatched_rows_are_cut_to_the_maximum_length() -> None:
    item = Item((example(tokens(1, 2, 3, 4, 5, 6), tokens(7)),), (tokens(11, 12, 13, 14),))
    batch = collator()([item])
    assert batch.mismatched is not None
    assert batch.mismatched.blocks[0].tolist() == [[1, 2, 3, 4, 5, 6, 11]]
    assert batch.mismatched.targets.tolist() == [11, 12]


def test_paired_batch_is_chosen_rows_then_rejected() -> None:
    prompt = tokens(1)
    items = [Item((example(prompt, tokens(2 + i), True), example(prompt, tokens(12 + i), False))) for i in range(3)]
    batch = collator("paired")(items)
    assert isinstance(batch, PairedBatch)
    assert batch.num_examples == 3
    assert batch.completions.targets.tolist() == [2, 3, 4, 12, 13, 14]
    assert batch.desirable.tolist() == [True] * 3 + [False] * 3


def test_sft_batch() -> None:
    assert isinstance(collator("sft")([Item((example(tokens(1), tokens(2), None),))]), SFTBatch)


def test_pairing_inside_the_batch() -> None:
    """The paper's y′, but never of the same prompt: a rotation by one would pair the first two rows."""
    rows = [(tokens(1), tokens(2)), (tokens(1), tokens(3)), (tokens(4), tokens(5)), (tokens(6), tokens(7))]
    batch = collator(pair_in_batch=True)([Item((example(x, y),)) for x, y in rows])
    assert batch.mismatched is not None
    prompts = batch.mismatched.blocks[0][:, 0].tolist()
    partners = batch.mismatched.targets.tolist()
    owner = {2: 1, 3: 1, 5: 4, 7: 6}
    assert prompts == [1, 1, 4, 6]
    assert sorted(partners) == [2, 3, 5, 7]
    assert all(owner[y] != x for x, y in zip(prompts, partners, strict=True))


def test_pairing_inside_a_batch_of_one_prompt_is_refused() -> None:
    items = [Item((example(tokens(1), tokens(i), row=i),)) for i in (2, 3)]
    with pytest.raises(DataError, match=r"f\.jsonl:2: no other row of its micro-batch of 2.*--data\.mismatch dataset"):
        collator(pair_in_batch=True)(items)


def test_batches_move_as_one(tmp_path: Path) -> None:
    item = Item((example(tokens(1), tokens(2)),), (tokens(3),))
    batch = collator()([item]).to(torch.device("meta"))
    assert isinstance(batch, UnpairedBatch)
    assert batch.desirable.is_meta
    assert batch.completions.blocks[0].is_meta
    assert batch.mismatched is not None
    assert batch.mismatched.targets.is_meta
