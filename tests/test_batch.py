"""The carriers: they move as one, and pairs come apart as chosen and rejected."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from halos_pl.batch import Batch, CompletionLogps, PairedBatch, Sequences, SFTBatch, UnpairedBatch
from halos_pl.data.collate import sequences


def rows(*lengths: int) -> Sequences:
    """Completions of these lengths, after prompts of 2 tokens."""
    return sequences([(torch.ones(2).numpy(), torch.ones(n).numpy()) for n in lengths], pad_id=0, vocab_size=5)


def scores(n: int) -> CompletionLogps:
    by_row, tokens = torch.arange(float(n)), torch.arange(3.0 * n)
    return CompletionLogps(by_row, by_row + 10, by_row.long() + 20, tokens, by_row + 30, tokens + 1, tokens + 2)


def test_counts() -> None:
    x = rows(1, 3, 2, 4)
    assert (x.num_rows, x.num_scored, x.num_tokens) == (4, 10, 18)
    assert SFTBatch(x).num_examples == UnpairedBatch(x, desirable=torch.ones(4).bool()).num_examples == 4
    assert PairedBatch(x).num_examples == 2


def test_chosen_rows_come_first() -> None:
    assert PairedBatch(rows(1, 3, 2, 4)).desirable.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    "batch",
    [
        SFTBatch(rows(1, 2)),
        UnpairedBatch(rows(1, 2), rows(3, 1), desirable=torch.tensor([True, False])),
        PairedBatch(rows(1, 2), rows(3, 1)),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_a_batch_moves_whole_and_keeps_its_class(batch: Batch) -> None:
    for moved in (batch.to("meta"), move_data_to_device(batch, torch.device("meta"))):
        assert type(moved) is type(batch)
        for part in ("completions", "mismatched"):
            old, new = getattr(batch, part), getattr(moved, part)
            assert (old is None) == (new is None)
            for field in fields(Sequences) if old is not None else ():
                a, b = getattr(old, field.name), getattr(new, field.name)
                if not isinstance(a, torch.Tensor | tuple):
                    assert a == b
                    continue
                for before, after in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (a, b)), strict=True):
                    assert (after.device.type, after.shape) == ("meta", before.shape)
        if isinstance(batch, UnpairedBatch):
            assert moved.desirable.device.type == "meta"
    assert batch.completions.blocks[0].device.type == "cpu"


@pytest.mark.gpu
def test_a_pinned_batch_arrives_without_waiting() -> None:
    pinned = PairedBatch(rows(1, 2), rows(3, 1)).pin_memory()
    assert pinned.mismatched is not None
    assert pinned.mismatched.blocks[0].is_pinned()
    assert pinned.to("cuda", non_blocking=True).completions.targets.is_cuda


def test_a_batch_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        SFTBatch(rows(1)).mismatched = rows(2)  # type: ignore[misc]


def test_pairs_split_every_field_of_a_row_and_no_field_of_a_token() -> None:
    whole = scores(4)
    chosen, rejected = whole.pairs()
    for name in ("logratio", "logp", "length", "ref_logp"):
        old, first, second = (getattr(x, name) for x in (whole, chosen, rejected))
        assert torch.equal(torch.cat([first, second]), old)
        assert len(first) == len(second) == 2
    for name in ("token_logp", "token_logratio", "entropy"):
        assert getattr(chosen, name) is getattr(rejected, name) is getattr(whole, name)


def test_pairs_without_a_reference() -> None:
    x = scores(2)
    chosen, _ = CompletionLogps(x.logp, x.logp, x.length, x.token_logp).pairs()
    assert chosen.ref_logp is None
    assert chosen.logp.tolist() == [10]


def test_an_odd_number_of_rows_is_no_pairs() -> None:
    with pytest.raises(ValueError, match="an even number of rows, got 3"):
        scores(3).pairs()
