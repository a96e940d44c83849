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


@pytest.mark.parametrize("world", [2, 3])
def test_stratified_over_ranks(world: int) -> None:
    labels = np.arange(48) % 4 == 0
    parts = ranks(48, world, labels=labels)
    merged = [part[k] for k in range(len(parts[0])) for part in parts]
    assert [bool(labels[row]) for row in merged] == [True, False] * 12
