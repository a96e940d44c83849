"""Micro-batches, for whatever sizes, classes, lengths, prompts and ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from halos_pl.data.batches import EpochBatches

FEW = settings(max_examples=300, deadline=None, derandomize=True)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    size, seed = draw(st.integers(0, 120)), draw(st.integers(0, 5))
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"size": size, "batch_size": draw(st.integers(1, 9)), "seed": seed}
    options["shuffle"] = draw(st.booleans())
    kind = draw(st.sampled_from(["rows", "couples", "prompts"]))
    if kind == "couples":
        options["labels"] = rng.random(size) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
        options["batch_size"] += 1
    if kind == "prompts":
        options["prompts"] = rng.integers(0, draw(st.integers(1, 60)), size)
    if draw(st.booleans()):
        options["lengths"] = rng.integers(1, draw(st.sampled_from([2, 40])), size)
        options["group_by_length"] = draw(st.booleans())
        options["members"] = draw(st.integers(1, 2))
        if draw(st.booleans()):
            least = int(options["lengths"].max(initial=1)) * options["members"] * 2
            options["max_tokens"] = least + draw(st.integers(0, 200))
    if "prompts" not in options and "max_tokens" not in options:
        options["drop_last"] = draw(st.booleans())
    return options


def parts(options: dict[str, Any], world: int, epoch: int) -> list[list[list[int]]]:
    out = []
    for rank in range(world):
        batches = EpochBatches(**options, num_replicas=world, rank=rank)
        batches.set_epoch(epoch)
        out.append(list(batches))
        assert len(batches) == len(out[-1])
        assert out[-1] == [batches.at(epoch, step) for step in range(len(batches))]
    return out


@FEW
@given(cases(), st.sampled_from([1, 2, 3, 4, 7]), st.integers(0, 3))
def test_every_row_once_in_equally_many_micro_batches(options: dict[str, Any], world: int, epoch: int) -> None:
    batches = parts(options, world, epoch)
    assert len({len(part) for part in batches}) == 1
    every = [rows for part in batches for rows in part]
    assert all(every), "none is empty"
    rows = [row for rows in every for row in rows]
    one = EpochBatches(**options, num_replicas=world)
    one.set_epoch(epoch)
    assert len(rows) == one.total - one.left_out + one.repeated
    assert len(set(rows)) == one.total - one.left_out
    atoms = one.total // one.unit
    small = options["batch_size"] // one.unit == 1 or "max_tokens" in options
    if options.get("drop_last"):
        assert one.left_out == atoms % (world * (options["batch_size"] // one.unit)) * one.unit
        assert len({len(part) for part in every}) <= 1
    elif options["shuffle"]:
        assert one.left_out < world * one.unit
        assert one.left_out == 0 or atoms < world or small
    else:
        assert one.left_out == 0
    assert one.repeated == 0 or (not options["shuffle"] and 0 < atoms < world)
    if "labels" in options:
        assert all(2 * options["labels"][rows].sum() == len(rows) for rows in every)
    elif atoms >= world and not one.left_out:
        assert sorted(rows) == list(range(options["size"]))


@FEW
@given(cases(), st.sampled_from([1, 2, 4]), st.integers(0, 2))
def test_never_more_than_asked_for(options: dict[str, Any], world: int, epoch: int) -> None:
    options["shuffle"] = True
    for part in parts(options, world, epoch):
        for rows in part:
            assert len(rows) <= options["batch_size"]
            if "max_tokens" in options:
                padded = len(rows) * options["members"] * options["lengths"][rows].max()
                assert padded <= options["max_tokens"]


@FEW
@given(st.integers(1, 200), st.sampled_from([2, 4, 6]), st.booleans(), st.integers(0, 3))
def test_global_batches_agree(size: int, batch: int, stratified: bool, epoch: int) -> None:
    options: dict[str, Any] = {"size": size, "seed": 1, "shuffle": True}
    if stratified:
        options["labels"] = np.arange(size) % 3 == 0
    (alone,) = parts({**options, "batch_size": 4 * batch}, 1, epoch)
    for world, accumulated in ((2, 1), (4, 1), (1, 4), (2, 2)):
        ranks = parts({**options, "batch_size": 4 * batch // world // accumulated}, world, epoch)
        steps = list(zip(*ranks, strict=True))
        for k in range(EpochBatches(**options, batch_size=1 + stratified).total // (4 * batch) - 1):
            mine = [rows for step in steps[k * accumulated : (k + 1) * accumulated] for rows in step]
            assert [row for rows in mine for row in rows] == alone[k]


@FEW
@given(st.integers(1, 150), st.integers(1, 60), st.integers(1, 12), st.integers(0, 3))
def test_prompts_stay_together_where_they_fit(size: int, kinds: int, batch: int, epoch: int) -> None:
    prompts = np.random.default_rng(epoch).integers(0, kinds, size)
    options = {"size": size, "seed": 1, "shuffle": False, "batch_size": batch, "prompts": prompts}
    (batches,) = parts(options, 1, 0)
    where: dict[int, set[int]] = {}
    for k, rows in enumerate(batches):
        for row in rows:
            where.setdefault(int(prompts[row]), set()).add(k)
    for prompt, places in where.items():
        rows = int((prompts == prompt).sum())
        assert len(places) == -(-rows // batch)
    (trained,) = parts({**options, "shuffle": True}, 1, epoch)
    order = prompts[[row for rows in trained for row in rows]]
    assert int((np.diff(order) != 0).sum()) == len(np.unique(prompts)) - 1, "one after the other"


@FEW
@given(cases(), st.sampled_from([1, 2, 4]), st.integers(0, 3), st.integers(0, 40))
def test_start_leaves_out_the_first(options: dict[str, Any], world: int, epoch: int, start: int) -> None:
    whole = parts(options, world, epoch)[-1]
    batches = EpochBatches(**options, num_replicas=world, rank=world - 1, start=start)
    batches.set_epoch(epoch)
    assert list(batches) == whole[start:]
    batches.set_epoch(epoch + 1)
    assert list(batches) == parts(options, world, epoch + 1)[-1]


@FEW
@given(cases(), st.sampled_from([1, 3]))
def test_epochs_of_rows_are_equally_many(options: dict[str, Any], world: int) -> None:
    options = {k: v for k, v in options.items() if k not in ("labels", "prompts")}
    batches = EpochBatches(**options, num_replicas=world)
    assert len({len(batches.plan(epoch).begins) for epoch in range(5)}) == 1
