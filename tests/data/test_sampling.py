"""The order of rows: a function of (seed, epoch), cut over ranks so that global batches agree."""

from __future__ import annotations

import numpy as np
import pytest

from halos_pl.data.sampling import EpochSampler


def ranks(size: int, world: int, epoch: int = 0, **options: object) -> list[list[int]]:
    out = []
    for rank in range(world):
        sampler = EpochSampler(size, shuffle=True, seed=7, num_replicas=world, rank=rank, **options)  # type: ignore[arg-type]
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler)
        out.append(rows)
    return out


def test_every_row_once_and_another_order_each_epoch() -> None:
    (first,), (second,) = ranks(101, 1), ranks(101, 1, epoch=1)
    assert sorted(first) == sorted(second) == list(range(101))
    assert first != second
    assert first == ranks(101, 1)[0]


@pytest.mark.parametrize("world", [2, 3])
def test_global_batches_do_not_depend_on_the_ranks(world: int) -> None:
    batch = 12
    (alone,) = ranks(96, 1)
    parts = ranks(96, world)
    for k in range(96 // batch):
        together = sorted(row for part in parts for row in part[k * batch // world : (k + 1) * batch // world])
        assert together == sorted(alone[k * batch : (k + 1) * batch])


def test_uneven_sizes() -> None:
    assert [len(part) for part in ranks(10, 4, drop_last=True)] == [2] * 4
    assert len({row for part in ranks(10, 4, drop_last=True) for row in part}) == 8
    padded = ranks(10, 4)
    assert [len(part) for part in padded] == [3] * 4
    assert {row for part in padded for row in part} == set(range(10)), "no row of an evaluation is lost"
    assert {row for part in ranks(1, 4) for row in part} == {0}


def test_stratified_batches_hold_equal_halves_and_show_every_row_in_time() -> None:
    labels = np.array([True] * 6 + [False] * 20)
    seen: set[int] = set()
    for epoch in range(4):
        (rows,) = ranks(26, 1, epoch, labels=labels)
        assert len(rows) == 12
        for k in range(0, 12, 4):
            assert labels[rows[k : k + 4]].sum() == 2
        seen.update(rows)
    assert seen == set(range(26))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_stratified_over_ranks(world: int) -> None:
    """Each rank's micro-batch has equal halves; all of them together are a slice of the one global order."""
    labels = np.arange(96) % 4 == 0
    (alone,) = ranks(96, 1, labels=labels)
    parts = ranks(96, world, labels=labels)
    assert [bool(labels[row]) for row in alone] == [True, False] * 24
    for batch in (2, 4, 8):
        for k in range(48 // world // batch):
            micro = [part[k * batch : (k + 1) * batch] for part in parts]
            assert [int(labels[rows].sum()) for rows in micro] == [batch // 2] * world
            together = sorted(row for rows in micro for row in rows)
            assert together == sorted(alone[k * batch * world : (k + 1) * batch * world])


def test_stratified_uneven_sizes() -> None:
    labels = np.arange(20) < 5
    dropped, padded = (ranks(20, 3, labels=labels, drop_last=flag) for flag in (True, False))
    assert [len(part) for part in dropped] == [2] * 3
    assert [len(part) for part in padded] == [4] * 3
    assert all(labels[part].sum() == len(part) // 2 for part in dropped + padded)
    assert {row for part in padded for row in part if labels[row]} == set(range(5))


def test_held_out_halves_stay_the_same() -> None:
    """In the order of the data; which rows of the larger class are left out is a matter of the seed alone."""
    labels = np.array([True] * 6 + [False] * 20)
    sampler = EpochSampler(26, shuffle=False, seed=7, labels=labels)
    first = list(sampler)
    sampler.set_epoch(3)
    assert list(sampler) == first
    assert first[::2] == list(range(6))
    assert first[1::2] == sorted(first[1::2])
    assert set(first[1::2]) < set(range(6, 26))
    assert first != list(EpochSampler(26, shuffle=False, seed=8, labels=labels))
