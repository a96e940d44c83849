"""Micro-batches: a function of (seed, epoch), cut over ranks so that global batches agree."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, Dataset

from halos_pl.data.batches import EpochBatches

Batches = list[list[int]]


def ranks(size: int, world: int = 1, epoch: int = 0, batch_size: int = 2, shuffle: bool = True, **options: Any) -> Any:
    """[rank][step] rows."""
    out = []
    for rank in range(world):
        batches = EpochBatches(
            size, batch_size=batch_size, shuffle=shuffle, seed=7, num_replicas=world, rank=rank, **options
        )
        batches.set_epoch(epoch)
        mine = list(batches)
        assert len(mine) == len(batches)
        out.append(mine)
    return out


def sizes(parts: list[Batches]) -> list[list[int]]:
    """[step][rank]"""
    return [[len(rows) for rows in step] for step in zip(*parts, strict=True)]


def flat(parts: list[Batches]) -> list[int]:
    return [row for step in zip(*parts, strict=True) for rows in step for row in rows]


def longest_first(size: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).permutation(np.arange(size)) % 50 + 1


def test_every_row_once_and_another_order_each_epoch() -> None:
    first, second = ranks(101, batch_size=8), ranks(101, epoch=1, batch_size=8)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(101))
    assert first != second
    assert first == ranks(101, batch_size=8)
    assert [type(row) for row in first[0][0]] == [int] * 8
    assert sizes(first) == [[8]] * 12 + [[5]]


def test_the_order_is_that_of_earlier_releases() -> None:
    """Golden trajectories hang on it."""
    for epoch in (0, 3):
        assert flat(ranks(20, epoch=epoch)) == np.random.default_rng([7, epoch]).permutation(20).tolist()
    assert flat(ranks(5, shuffle=False, epoch=3)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("world", "accumulated"), [(2, 1), (4, 1), (1, 2), (2, 2), (3, 4)])
def test_global_batches_do_not_depend_on_ranks_and_accumulation(world: int, accumulated: int) -> None:
    (alone,) = ranks(101, batch_size=12)
    parts = ranks(101, world, batch_size=12 // world // accumulated)
    steps = list(zip(*parts, strict=True))
    for k in range(101 // 12):
        together = [rows for step in steps[k * accumulated : (k + 1) * accumulated] for rows in step]
        assert [row for rows in together for row in rows] == alone[k]


def test_a_remainder_is_spread_over_the_ranks() -> None:
    assert sizes(ranks(9, 4)) == [[2, 1, 1, 1], [1, 1, 1, 1]]
    assert sizes(ranks(14, 4)) == [[2, 2, 2, 2], [2, 2, 1, 1]]
    assert sizes(ranks(17, 2, batch_size=4)) == [[4, 4], [3, 2], [2, 2]]
    assert sizes(ranks(5, 3, batch_size=8)) == [[2, 2, 1]]
    for world in (1, 2, 3, 4):
        for shuffle in (True, False):
            assert sorted(flat(ranks(33, world, batch_size=4, shuffle=shuffle))) == list(range(33))


def test_training_leaves_out_what_cannot_be_spread_other_rows_each_epoch() -> None:
    seen = set()
    for epoch in range(6):
        parts = ranks(10, 4, epoch, batch_size=1)
        assert sizes(parts) == [[1] * 4] * 2
        seen.add(frozenset(range(10)) - frozenset(flat(parts)))
    assert len(seen) > 1
    for tokens in (None, 99):
        options = {"lengths": np.arange(1, 11), "group_by_length": True, "max_tokens": tokens}
        left = [set(range(10)) - set(flat(ranks(10, 4, epoch, batch_size=1, **options))) for epoch in range(20)]
        assert [len(rows) for rows in left] == [2] * 20
        assert set.union(*left) == set(range(10)), "long and short ones alike"
    few = EpochBatches(3, batch_size=8, shuffle=True, seed=7, num_replicas=4, rank=2)
    assert (len(few), list(few), few.left_out, few.repeated) == (0, [], 3, 0)
    one = EpochBatches(10, batch_size=1, shuffle=True, seed=7, num_replicas=4)
    assert (one.left_out, one.repeated) == (2, 0)


def test_evaluation_loses_no_row() -> None:
    assert ranks(7, 4, batch_size=1, shuffle=False) == [[[0]], [[1, 2]], [[3, 4]], [[5, 6]]]
    assert sizes(ranks(10, 4, batch_size=1, shuffle=False)) == [[1] * 4, [1, 1, 2, 2]]
    assert ranks(2, 5, batch_size=8, shuffle=False) == [[[0]], [[1]], [[0]], [[1]], [[0]]]
    few = EpochBatches(2, batch_size=8, shuffle=False, seed=7, num_replicas=5)
    assert (few.repeated, few.left_out) == (3, 0)
    enough = EpochBatches(7, batch_size=1, shuffle=False, seed=7, num_replicas=4)
    assert (enough.repeated, enough.left_out) == (0, 0)


def test_drop_last_wants_full_micro_batches() -> None:
    for lengths in (None, longest_first(23)):
        seen = set()
        for epoch in range(6):
            parts = ranks(
                23, 2, epoch, batch_size=4, drop_last=True, lengths=lengths, group_by_length=lengths is not None
            )
            assert sizes(parts) == [[4, 4]] * 2
            seen.add(frozenset(flat(parts)))
        assert len(seen) > 1, "other rows each epoch, sorted by length or not"
    batches = EpochBatches(23, batch_size=4, shuffle=True, seed=7, drop_last=True)
    assert (len(batches), batches.left_out) == (5, 3)
    assert not len(EpochBatches(7, batch_size=4, shuffle=True, seed=7, num_replicas=2, drop_last=True))


def test_nothing_to_batch() -> None:
    empty = np.array([], dtype=int)
    assert ranks(0) == ranks(0, 1, lengths=empty, max_tokens=8, group_by_length=True) == ranks(0, prompts=empty) == [[]]
    assert ranks(0, 3, shuffle=False) == [[], [], []]
    assert ranks(5, labels=np.ones(5, dtype=bool)) == ranks(5, labels=np.zeros(5, dtype=bool)) == [[]]
    assert ranks(5, labels=np.ones(5, dtype=bool), shuffle=False) == [[]]
    assert ranks(1, batch_size=8) == ranks(1, batch_size=1, shuffle=False) == [[[0]]]


# Classes


def test_sorted_labels_mix() -> None:
    """TRL's blocks of 1000 chosen, then 1000 rejected: within 5 sigma of the hypergeometric mean, and of its spread."""
    (batches,) = ranks(2000, batch_size=32)
    desirable = np.array([sum(row < 1000 for row in rows) for rows in batches[:-1]])
    sigma = np.sqrt(32 * 0.25 * (2000 - 32) / 1999)
    assert np.abs(desirable - 16).max() < 5 * sigma
    assert 0.6 * sigma < desirable.std() < 1.4 * sigma


def test_stratified_batches_hold_equal_halves_and_show_every_row_in_time() -> None:
    labels = np.array([True] * 6 + [False] * 20)
    seen: set[int] = set()
    for epoch in range(4):
        (batches,) = ranks(26, epoch=epoch, batch_size=4, labels=labels)
        assert [int(labels[rows].sum()) for rows in batches] == [2, 2, 2]
        assert set(range(6)) < set(flat([batches]))
        seen.update(flat([batches]))
    assert seen == set(range(26))


def test_stratified_order_is_that_of_earlier_releases() -> None:
    labels = np.arange(26) % 4 == 0
    for epoch in (0, 3):
        rng, columns = np.random.default_rng([7, epoch]), []
        for label in (True, False):
            fixed = np.random.default_rng(7).permutation(np.flatnonzero(labels == label))
            columns.append(rng.permutation(np.roll(fixed, -7 * epoch)[:7]))
        assert flat(ranks(26, epoch=epoch, labels=labels)) == np.stack(columns, axis=1).reshape(-1).tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch", [2, 4, 8])
def test_stratified_over_ranks(world: int, batch: int) -> None:
    """Each micro-batch has equal halves; those of all ranks are a slice of the one global order."""
    labels = np.arange(97) % 4 == 0
    (alone,) = ranks(97, batch_size=2, labels=labels)
    assert [bool(labels[row]) for row in flat([alone])] == [True, False] * 25
    parts = ranks(97, world, batch_size=batch, labels=labels)
    assert all(2 * labels[rows].sum() == len(rows) <= batch for part in parts for rows in part)
    assert flat(parts) == flat([alone])[: len(flat(parts))]
    assert len(flat(parts)) == (50 if batch > 2 else 50 // (2 * world) * 2 * world)


def test_stratified_uneven_sizes() -> None:
    labels = np.arange(20) < 5
    trained, held_out = (ranks(20, 3, labels=labels, shuffle=flag) for flag in (True, False))
    assert sizes(trained) == [[2, 2, 2]], "couples of batch_size 2: two are left out"
    assert sizes(held_out) == [[2, 4, 4]]
    assert set(flat(held_out)) > set(range(5))
    repeated = EpochBatches(20, batch_size=2, shuffle=False, seed=7, num_replicas=8, rank=6, labels=labels)
    assert (repeated.repeated, repeated.left_out, len(repeated)) == (6, 0, 1)
    assert labels[next(iter(repeated))].tolist() == [True, False]
    assert sizes(ranks(20, labels=labels, batch_size=5)) == [[4], [4], [2]], "an odd size takes a row less"


def test_classes_of_very_different_sizes() -> None:
    labels = np.zeros(10_000, dtype=bool)
    labels[4321] = True
    first, second = ranks(10_000, labels=labels), ranks(10_000, epoch=1, labels=labels)
    assert sizes(first) == [[2]]
    assert 4321 in first[0][0]
    assert 4321 in second[0][0]
    assert first != second


def test_held_out_halves_stay_the_same() -> None:
    """In the order of the data; which rows of the larger class are left out is a matter of the seed alone."""
    labels = np.array([True] * 6 + [False] * 20)
    first = flat(ranks(26, labels=labels, shuffle=False))
    assert flat(ranks(26, epoch=3, labels=labels, shuffle=False)) == first
    assert first[::2] == list(range(6))
    assert first[1::2] == sorted(first[1::2])
    assert set(first[1::2]) < set(range(6, 26))
    other = EpochBatches(26, batch_size=2, shuffle=False, seed=8, labels=labels)
    assert first != [row for rows in other for row in rows]


# Lengths


def test_max_tokens_by_hand() -> None:
    lengths = np.array([1, 2, 6, 1, 1, 1, 9, 3])
    (batches,) = ranks(8, batch_size=3, shuffle=False, lengths=lengths, max_tokens=12)
    assert batches == [[0, 1], [2, 3], [4, 5], [6], [7]]
    (pairs,) = ranks(8, batch_size=3, shuffle=False, lengths=lengths, max_tokens=24, members=2)
    assert pairs == batches
    (wide,) = ranks(8, batch_size=3, shuffle=False, lengths=lengths, max_tokens=1000)
    assert wide == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_max_tokens_halves_the_largest_for_the_ranks() -> None:
    lengths = np.array([1, 1, 1, 1, 5, 5, 3, 3])
    parts = ranks(8, 2, batch_size=4, shuffle=False, lengths=lengths, max_tokens=5)
    assert parts == [[[0, 1], [4], [6]], [[2, 3], [5], [7]]], "[0-3] [4] [5] [6] [7] are five: the first is halved"
    lengths = np.array([2, 2, 2, 1, 1, 1, 1, 8])
    parts = ranks(8, 2, batch_size=4, shuffle=False, lengths=lengths, max_tokens=8)
    assert parts == [[[0, 1], [4, 5, 6]], [[2, 3], [7]]], "[0-3] [4-6] [7]"
    three, four = np.array([2, 2, 2, 8, 1, 1, 1, 1]), np.array([1] * 8 + [4] * 2)
    assert sizes(ranks(8, 4, batch_size=4, shuffle=False, lengths=three, max_tokens=8)) == [[3, 1, 2, 2]]
    assert sizes(ranks(10, 4, batch_size=8, shuffle=False, lengths=four, max_tokens=8)) == [[2, 2, 4, 2]]


def test_a_row_that_does_not_fit() -> None:
    lengths = np.array([3, 17, 4])
    with pytest.raises(ValueError, match="row 1 has 17 tokens: max_tokens 16 must be 17 or more"):
        ranks(3, lengths=lengths, max_tokens=16)
    with pytest.raises(ValueError, match="must be 34 or more"):
        ranks(3, lengths=lengths, max_tokens=33, members=2)
    with pytest.raises(ValueError, match="must be 34 or more"):
        ranks(3, lengths=lengths, max_tokens=33, labels=lengths > 3)
    assert sorted(flat(ranks(3, lengths=lengths, max_tokens=17))) == [0, 1, 2]


def test_rows_of_like_length_come_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 4096)
    plain = EpochBatches(4096, batch_size=8, shuffle=True, seed=7, num_replicas=2, lengths=lengths)
    grouped = EpochBatches(
        4096, batch_size=8, shuffle=True, seed=7, num_replicas=2, lengths=lengths, group_by_length=True
    )
    assert plain.padding() > 0.35
    assert grouped.padding() < 0.02
    steps = [
        lengths[grouped.plan(1).rows[b[0] : e[-1]]]
        for b, e in zip(grouped.plan(1).begins, grouped.plan(1).ends, strict=True)
    ]
    assert np.mean([np.ptp(step) for step in steps]) < 40, "those of both ranks too"
    means = np.array([step.mean() for step in steps])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.25, "long and short steps mix"
    assert len({frozenset(grouped.at(epoch, 0)) for epoch in range(1, 5)}) == 4


def test_the_most_padded_step_comes_first_in_the_first_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 1000)
    for options in ({"group_by_length": True}, {"max_tokens": 8000}, {"group_by_length": True, "max_tokens": 8000}):
        batches = EpochBatches(1000, batch_size=16, shuffle=True, seed=7, lengths=lengths, **options)  # type: ignore[arg-type]
        firsts = []
        for epoch in range(4):
            batches.set_epoch(epoch)
            padded = [len(rows) * lengths[rows].max() for rows in batches]
            firsts.append(padded[0] == max(padded))
            assert sorted(row for rows in batches for row in rows) == list(range(1000))
        assert firsts[0]
        assert not all(firsts)


def test_couples_of_like_length() -> None:
    rng = np.random.default_rng(0)
    labels, lengths = rng.random(2000) < 0.3, rng.integers(1, 1000, 2000)
    batches = EpochBatches(
        *(2000,), batch_size=8, shuffle=True, seed=7, labels=labels, lengths=lengths, group_by_length=True
    )
    assert batches.padding() < 0.06
    assert all(2 * labels[rows].sum() == len(rows) == 8 for rows in list(batches)[:-1])


def test_evaluation_in_groups_has_no_random_order() -> None:
    lengths = np.array([1, 5, 3, 2, 4, 6])
    assert ranks(6, shuffle=False, lengths=lengths, group_by_length=True) == [[[5, 1], [4, 2], [3, 0]]]
    lengths = np.random.default_rng(0).permutation(128)
    order = lengths[flat(ranks(128, batch_size=1, shuffle=False, lengths=lengths, group_by_length=True))]
    assert order.tolist() == sorted(lengths[:64], reverse=True) + sorted(lengths[64:]), "falling, then rising"


def test_padding_by_hand() -> None:
    batches = EpochBatches(4, batch_size=2, shuffle=False, seed=0, lengths=np.array([1, 3, 4, 4]), members=2)
    assert batches.padding() == pytest.approx(2 / 14)
    assert EpochBatches(4, batch_size=2, shuffle=False, seed=0).padding() == 0
    some = EpochBatches(6, batch_size=1, shuffle=True, seed=0, num_replicas=4, lengths=np.full(6, 3), max_tokens=9)
    assert (some.left_out, some.padding()) == (2, 0), "of the rows that come"


def test_every_epoch_has_as_many_micro_batches() -> None:
    """Lightning stops every epoch after as many as the first one has."""
    rng = np.random.default_rng(1)
    for size in (40, 333, 5000):
        lengths = np.clip(rng.lognormal(4, 1, size).astype(int), 1, 500)
        for grouped in (False, True):
            for world in (1, 3):
                batches = EpochBatches(
                    *(size,), batch_size=16, shuffle=True, seed=1, num_replicas=world, lengths=lengths, max_tokens=1000,
                    group_by_length=grouped,
                )  # fmt: skip
                counts = []
                for epoch in range(12):
                    batches.set_epoch(epoch)
                    counts.append(len(batches))
                    assert batches.left_out == 0
                assert len(set(counts)) == 1
        prompts = rng.integers(0, size // 3, size)
        by_prompt = EpochBatches(size, batch_size=16, shuffle=True, seed=1, prompts=prompts)
        assert len({len(by_prompt.plan(epoch).begins) for epoch in range(12)}) == 1


# Prompts


def test_rows_of_a_prompt_come_together() -> None:
    prompts = np.array([5, 5, 9, 5, 2, 9, 2, 5, 2])
    assert ranks(9, batch_size=4, shuffle=False, prompts=prompts) == [[[0, 1, 3, 7], [2, 5], [4, 6, 8]]]
    assert ranks(9, batch_size=3, shuffle=False, prompts=prompts) == [[[0, 1, 3], [7, 2, 5], [4, 6, 8]]]
    assert ranks(9, batch_size=8, shuffle=False, prompts=prompts) == [[[0, 1, 3, 7, 2, 5], [4, 6, 8]]]
    tokens = ranks(9, batch_size=8, shuffle=False, prompts=prompts, lengths=np.full(9, 3), max_tokens=6)
    assert tokens == [[[0, 1], [3, 7], [2, 5], [4, 6], [8]]]
    alone = ranks(9, 9, batch_size=8, shuffle=False, prompts=prompts)
    assert sizes(alone) == [[1] * 9], "parted where there are not enough prompts for the ranks"


def test_prompts_are_shuffled_and_grouped_by_length() -> None:
    prompts = np.repeat(np.arange(50), 4)[np.random.default_rng(0).permutation(200)]
    first, second = ranks(200, batch_size=4, prompts=prompts), ranks(200, epoch=1, batch_size=4, prompts=prompts)
    whole = [rows for rows in first[0] if len(rows) == 4]
    assert len(whole) >= 48
    assert all(len(set(prompts[rows])) == 1 for rows in first[0] + second[0])
    assert first != second
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(200))
    lengths = prompts % 25 + 1
    grouped = ranks(200, batch_size=8, prompts=prompts, lengths=lengths, group_by_length=True)
    assert all(np.ptp(lengths[rows]) == 0 for rows in grouped[0])


# Position


def test_at_equals_iterating() -> None:
    lengths = longest_first(100)
    for options in ({}, {"lengths": lengths, "max_tokens": 200}, {"labels": lengths < 20}, {"prompts": lengths % 30}):
        one = EpochBatches(100, batch_size=6, shuffle=True, seed=7, num_replicas=2, rank=1, **options)  # type: ignore[arg-type]
        for epoch in (2, 0, 5):
            part = ranks(100, 2, epoch, batch_size=6, **options)[1]
            assert [one.at(epoch, step) for step in range(len(part))] == part
            with pytest.raises(IndexError):
                one.at(epoch, len(part))


def test_start_is_about_the_first_epoch_that_is_iterated() -> None:
    batches = EpochBatches(20, batch_size=2, shuffle=True, seed=7, start=7)
    early = iter(batches)  # Lightning asks for the iterator before it sets the epoch
    batches.set_epoch(3)
    whole = ranks(20, epoch=3)[0]
    assert list(early) == whole[7:]
    assert list(batches) == whole[7:], "however often"
    assert len(batches) == 10
    batches.set_epoch(4)
    assert list(batches) == ranks(20, epoch=4)[0]
    assert list(EpochBatches(20, batch_size=2, shuffle=True, seed=7, start=10)) == []


def test_setting_the_epoch_does_not_change_an_iteration_under_way() -> None:
    batches = EpochBatches(20, batch_size=2, shuffle=True, seed=7)
    under_way = iter(batches)
    first = next(under_way)
    batches.set_epoch(1)
    assert [first, *under_way] == ranks(20)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": 1, "labels": np.arange(6) < 3},
        {"members": 0},
        {"start": -1},
        {"labels": np.arange(5) < 3},
        {"lengths": np.arange(7), "max_tokens": 9},
        {"max_tokens": 9},
        {"group_by_length": True},
        {"labels": np.arange(6) < 3, "prompts": np.arange(6)},
        {"drop_last": True, "prompts": np.arange(6)},
        {"drop_last": True, "lengths": np.arange(6), "max_tokens": 9},
        {"num_replicas": 2, "rank": 2},
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        EpochBatches(6, **{"batch_size": 2, "shuffle": True, "seed": 0, **options})


# Loaders


class Rows(Dataset[list[int]]):
    def __getitem__(self, index: list[int]) -> list[int]:
        return index

    def __len__(self) -> int:
        return 41


def keep(rows: list[int]) -> list[int]:
    return rows


def loader(batches: EpochBatches, workers: int = 0, **options: Any) -> DataLoader[list[int]]:
    return DataLoader(Rows(), batch_size=None, sampler=batches, collate_fn=keep, num_workers=workers, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(workers: int) -> None:
    batches = EpochBatches(41, batch_size=4, shuffle=True, seed=7, num_replicas=2, rank=1)
    rows = loader(batches, workers, persistent_workers=True)
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        assert list(rows) == list(loader(batches)) == ranks(41, 2, epoch, batch_size=4)[1]
        assert len(rows) == 6


def test_pickles() -> None:
    batches = EpochBatches(41, batch_size=4, shuffle=True, seed=7, lengths=longest_first(41), max_tokens=99)
    whole = list(batches)
    assert list(pickle.loads(pickle.dumps(batches))) == whole


class Watch(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[int, list[int]]] = []
        self.ends: list[int] = []

    def training_step(self, batch: list[int], index: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch))
        if self.trainer.is_last_batch:
            self.ends.append(len(self.seen))
        return self.layer(torch.ones(1)).sum()

    def predict_step(self, batch: list[int], index: int) -> list[int]:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    given = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
    return L.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, enable_model_summary=False, **given)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"lengths": longest_first(41), "max_tokens": 100}])
def test_lightning_sets_the_epoch_and_runs_every_row(tmp_path: Path, options: dict[str, Any]) -> None:
    module, batches = Watch(), EpochBatches(41, batch_size=4, shuffle=True, seed=7, **options)
    trainer(tmp_path, max_epochs=4).fit(module, loader(batches))
    expected = [(epoch, rows) for epoch in range(4) for rows in ranks(41, epoch=epoch, batch_size=4, **options)[0]]
    assert module.seen == expected
    assert len(module.ends) == 4, "the last batch of an epoch is known as such: accumulation ends there"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_goes_on_in_the_middle_of_an_epoch(tmp_path: Path, workers: int) -> None:
    whole = [(epoch, rows) for epoch in range(3) for rows in ranks(41, epoch=epoch, batch_size=4)[0]]
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=15, save_top_k=-1)
    first = trainer(tmp_path, max_steps=15, callbacks=[saved], enable_checkpointing=True)
    first.fit(Watch(), loader(EpochBatches(41, batch_size=4, shuffle=True, seed=7)))
    batches = EpochBatches(41, batch_size=4, shuffle=True, seed=7, start=4)
    batches.set_epoch(1)
    module = Watch()
    trainer(tmp_path, max_epochs=3).fit(
        module, loader(batches, workers), ckpt_path=saved.best_model_path or saved.last_model_path
    )
    assert module.seen == whole[15:]
    assert module.ends == [7, 18]


@pytest.mark.filterwarnings("ignore")
def test_lightning_predicts_in_the_order_of_the_data(tmp_path: Path) -> None:
    out = trainer(tmp_path).predict(Watch(), loader(EpochBatches(41, batch_size=4, shuffle=False, seed=7)))
    assert out == ranks(41, batch_size=4, shuffle=False)[0]


def test_lightning_leaves_it_alone_on_many_ranks() -> None:
    connector = SimpleNamespace(use_distributed_sampler=True, is_distributed=True)
    fake = SimpleNamespace(_accelerator_connector=connector)
    data = _DataConnector(cast(Any, fake))
    ours = loader(EpochBatches(41, batch_size=4, shuffle=True, seed=7, num_replicas=2, rank=1))
    assert not data._requires_distributed_sampler(ours)
    assert data._requires_distributed_sampler(DataLoader(Rows())), "a loader of its own would be touched"
    assert data._prepare_dataloader(ours, shuffle=True, mode=RunningStage.TRAINING) is ours
    _set_sampler_epoch(ours, 5)
    assert list(ours) == ranks(41, 2, 5, batch_size=4)[1]


# Speed


@pytest.mark.parametrize("name", ["stratified", "grouped"])
def test_a_million_rows(name: str) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.3, 0.8, 1_000_000).astype(int), 8, 2048)
    options: dict[str, Any] = {"labels": rng.random(1_000_000) < 0.3}
    if name == "grouped":
        options = {"lengths": lengths, "max_tokens": 8192, "group_by_length": True}
    batches = EpochBatches(1_000_000, batch_size=32, shuffle=True, seed=7, num_replicas=8, rank=3, **options)
    began = time.process_time()
    assert len(batches) > 1000
    assert time.process_time() - began < 4, "0.4 s on one core of 2024"
