"""From small random files to batches: what holds whatever the rows, the options, the workers and the ranks."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halos_pl.batch import DataNeeds, PairedBatch, Sequences, UnpairedBatch
from halos_pl.data import AlignmentData, DataError, prepare
from halos_pl.data.loader import PlacedLoader

EOS = "</s>"
NO_PARTNER, NO_ROW = "there is no y′", "no row is left"
Rows = list[dict[str, Any]]
Told = list[tuple[str, str, bool]]  # prompt, completion with EOS, whether it is desirable


def quick(examples: int) -> settings:
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(derandomize=True, database=None, deadline=None, max_examples=examples, suppress_health_check=health)


PROMPTS = st.sampled_from(["a", "bb", "ask ", "é?", "x" * 19, "why not", "0", "字"])
COMPLETIONS = st.sampled_from([" y", "no", " yes" * 6, "é", "z" * 23, "1\n2", " 字", "x", " y "])


def chat(prompt: str, *replies: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": prompt}], *([{"role": "assistant", "content": x}] for x in replies)]


@st.composite
def files(draw: Callable[..., Any], least: int = 2) -> Rows:
    """Thumbs or pairs, plain or chats, with prompts and completions that come again; more than one of each."""
    paired, chats = draw(st.booleans()), draw(st.booleans())
    entry = st.tuples(PROMPTS, COMPLETIONS, COMPLETIONS, st.booleans()).filter(lambda x: x[1] != x[2])
    drawn = draw(st.lists(entry, min_size=least, max_size=24))
    rows: Rows = []
    for i, (prompt, one, other, label) in enumerate(drawn):
        prompt = f"{prompt}{i % 5}"  # so that most files have a y′ for every row
        texts: list[Any] = chat(prompt, one, other) if chats else [prompt, one, other]
        if paired:
            rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
        else:
            rows.append({"prompt": texts[0], "completion": texts[1], "label": label})
    return rows


@st.composite
def choices(draw: Callable[..., Any]) -> dict[str, Any]:
    """Options of micro-batches that go together."""
    given: dict[str, Any] = {"batch_size": draw(st.sampled_from([1, 2, 3, 4, 8])), "seed": draw(st.integers(0, 3))}
    given["group_by_length"] = draw(st.booleans())
    given["max_tokens"] = draw(st.sampled_from([None, None, 128, 200]))
    given["length_groups"] = draw(st.sampled_from([1, 2, 3]))
    given["pad_to_multiple_of"] = draw(st.sampled_from([1, 8]))
    kind = draw(st.sampled_from(["", "", "sampler", "prompt"]))
    if kind == "sampler":
        given |= {"sampler": "stratified", "batch_size": draw(st.sampled_from([2, 4, 8]))}
    if kind == "prompt":
        given["group_by_prompt"] = True
    return given


def told(rows: Rows) -> Told:
    """What the members of a file are, in its order."""
    found: Told = []
    for row in rows:
        plain = {k: x if isinstance(x, (str, bool)) else x[0]["content"] for k, x in row.items()}
        chats = not isinstance(row["prompt"], str)
        prompt = plain["prompt"] + "\n\n" * chats  # the template's plain one
        if "label" in row:
            found.append((prompt, f"{plain['completion']}{EOS}", plain["label"]))
        else:
            found += [(prompt, f"{plain['chosen']}{EOS}", True), (prompt, f"{plain['rejected']}{EOS}", False)]
    return found


def loaded(model: Path, rows: Rows, view: Any = "unpaired", mismatched: bool = True, **options: Any) -> AlignmentData:
    """A module that is set up; its cache goes with the folder, its tokens are mapped by then."""
    options = {"chat_template": "plain", **options}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "f.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = AlignmentData(train=str(file), cache=folder, **options)
        data.needs = DataNeeds(view, mismatched, str(model), 260, 128)
        data.setup("fit")
        return data


def texts(data: AlignmentData, rows: Sequences) -> list[tuple[str, str]]:
    """Prompt and scored completion of each row, read back from what the model gets: inputs and targets."""
    flat = torch.cat([block.reshape(-1) for block in rows.blocks])
    starts: list[int] = []
    at = 0
    for block in rows.blocks:
        starts += range(at, at + block.numel(), block.shape[1])
        at += block.numel()
    found = []
    for r in range(rows.num_rows):
        span = slice(int(rows.cu_seqlens[r]), int(rows.cu_seqlens[r + 1]))
        predictors, targets = rows.predictors[span], rows.targets[span]
        first, last = int(predictors[0]), int(predictors[-1])
        assert predictors.tolist() == list(range(first, last + 1))
        assert flat[first + 1 : last + 1].tolist() == targets[:-1].tolist(), "inputs and targets are one text"
        start = max(x for x in starts if x <= first)
        decode = data.tokenizer.decode
        found.append((decode(flat[start : first + 1]), decode(targets)))
    return found


def batches(data: AlignmentData, epoch: int = 0) -> list[Any]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    if isinstance(loader, PlacedLoader):
        loader.place = lambda: (epoch, 0)  # the trainer is a stand-in
    return list(loader)


def members(data: AlignmentData, batch: Any) -> Told:
    labels = batch.desirable.tolist()
    return [(*row, label) for row, label in zip(texts(data, batch.completions), labels, strict=True)]


def or_none(make: Callable[[], Any], *why: str) -> Any:
    """None where the data allow it, for one of these reasons."""
    try:
        return make()
    except DataError as error:
        if not any(x in str(error) for x in why):
            raise
        return None


# --------------------------------------------------------------------------------------------------- an epoch


@quick(120)
@given(rows=files(), options=choices(), paired_view=st.booleans(), epoch=st.integers(0, 2))
def test_an_epoch_has_every_row_once_and_whole(
    rows: Rows, options: dict[str, Any], paired_view: bool, epoch: int, tiny_model: Path
) -> None:
    """No token of a completion and no EOS is lost, no token of a prompt is scored; y′ is of another prompt."""
    paired_view = paired_view and "chosen" in rows[0] and "sampler" not in options
    view = "paired" if paired_view else "unpaired"
    data = or_none(lambda: loaded(tiny_model, rows, view, **options), NO_PARTNER)
    plan = data and or_none(lambda: batches(data, epoch), *[NO_ROW] * ("sampler" in options))
    if plan is None:
        return
    expected = Counter(told(rows))
    seen: Counter[tuple[str, str, bool]] = Counter()
    for batch in plan:
        mine = members(data, batch)
        seen.update(mine)
        assert isinstance(batch, PairedBatch if paired_view else UnpairedBatch)
        assert 0 < batch.num_examples <= options["batch_size"]
        if (most := options["max_tokens"]) is not None:
            longest = max(block.shape[1] for block in batch.completions.blocks)
            assert longest * batch.completions.num_rows <= most
        if "sampler" in options:
            assert 2 * sum(label for *_, label in mine) == len(mine)
        assert batch.mismatched is not None
        real = {(prompt, completion) for prompt, completion, _ in expected}
        for (prompt, own, _), (same, other) in zip(mine, texts(data, batch.mismatched), strict=True):
            assert same == prompt
            assert other != own
            assert any(completion == other and x != prompt for x, completion in real), "of another prompt"
        if options.get("group_by_prompt"):
            order = [prompt for prompt, *_ in mine[: batch.num_examples]]
            assert len({*order}) == 1 + sum(a != b for a, b in pairwise(order))
    if "sampler" in options:
        few = min(Counter(label for *_, label in expected.elements()).values())
        assert seen <= expected
        assert Counter(label for *_, label in seen.elements()) == {True: few, False: few}
    else:
        assert seen == expected


@quick(40)
@given(rows=files(least=8), options=choices(), epoch=st.integers(0, 2))
def test_ranks_part_an_epoch(rows: Rows, options: dict[str, Any], epoch: int, tiny_model: Path) -> None:
    """The same rows over 1, 2 and 4 ranks, equally many micro-batches on each; what cannot be spread is left out."""
    data = loaded(tiny_model, rows, mismatched=False, **options)
    found = {}
    for world in (1, 2, 4):
        ranks = []
        for rank in range(world):
            data.trainer = SimpleNamespace(world_size=world, global_rank=rank)  # type: ignore[assignment]
            ranks.append(or_none(lambda: batches(data, epoch), NO_ROW))
        if None in ranks:
            assert len(rows) < world or "sampler" in options or "group_by_prompt" in options
            return
        assert len({len(plan) for plan in ranks}) == 1
        found[world] = Counter(row for plan in ranks for batch in plan for row in members(data, batch))
    whole = found[1].total()
    for world in (2, 4):
        left = whole - found[world].total()
        unit = 2 if "sampler" in options else 1
        may = (
            "group_by_prompt" in options or options["max_tokens"] or min(options["batch_size"], whole // world) <= unit
        )
        assert 0 <= left <= ((world - 1) * unit if may else 0)
        assert found[world] <= Counter(told(rows))
        assert left or found[world] == found[1]


@quick(25)
@given(rows=files(least=8), size=st.sampled_from([4, 8]), where=st.sampled_from(["dataset", "batch"]))
def test_y_prime_in_the_batch(rows: Rows, size: int, where: Any, tiny_model: Path) -> None:
    data = or_none(lambda: loaded(tiny_model, rows, batch_size=size, mismatch=where), NO_PARTNER)
    in_batch = ["to serve as y′", NO_ROW] if where == "batch" else []
    plan = data and or_none(lambda: batches(data), *in_batch)
    if plan is None:
        return
    by_completion: dict[str, set[str]] = {}
    for prompt, completion, _ in told(rows):
        by_completion.setdefault(completion, set()).add(prompt)
    for batch in plan:
        mine = texts(data, batch.completions)
        for (prompt, own), (same, other) in zip(mine, texts(data, batch.mismatched), strict=True):
            assert same == prompt
            assert other != own
            assert by_completion[other] - {prompt}
            if where == "batch":
                assert any(y == other and x != prompt for x, y in mine), "of this very micro-batch"


# ------------------------------------------------------------------------------------------------ class mix, processes


@pytest.mark.parametrize("options", [{}, {"group_by_length": True}, {"max_tokens": 300}], ids=str)
def test_shuffled_batches_mix_the_classes_as_chance_does(options: dict[str, Any], tiny_model: Path) -> None:
    """400 rows in blocks of one class: the count in batches of 8 has the hypergeometric mean and variance."""
    rows = [{"prompt": f"p{i:03}", "completion": " y" * (1 + i % 7), "label": i < 200} for i in range(400)]
    data = loaded(tiny_model, rows, mismatched=False, batch_size=8, **options)
    for epoch in range(3):
        plan = [batch for batch in batches(data, epoch) if batch.num_examples == 8]
        counts = [int(batch.desirable.sum()) for batch in plan]
        assert len(plan) > 20
        variance = 8 * 0.25 * (392 / 399)
        observed = sum((x - 4) ** 2 for x in counts) / len(counts)
        assert abs(observed - variance) < 5 * variance * math.sqrt(2 / len(counts))
        assert abs(sum(counts) / len(counts) - 4) < 5 * math.sqrt(variance / len(counts))


@pytest.mark.parametrize("options", [{"group_by_length": True, "max_tokens": 256}, {"sampler": "stratified"}], ids=str)
def test_loader_processes_change_nothing(options: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 9}", "completion": f" {i}" * (1 + i % 7), "label": i % 3 > 0} for i in range(30)]
    file = tmp_path / "f.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for workers in (0, 1, 4):
        data = AlignmentData(train=str(file), batch_size=4, num_workers=workers, cache=str(tmp_path / "c"), **options)
        data.needs = DataNeeds("unpaired", True, str(tiny_model), 260, 128)
        data.setup("fit")
        loader = data.train_dataloader()
        epochs = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            epochs.append([(members(data, x), texts(data, x.mismatched)) for x in loader])
        found.append(epochs)
    assert found[0] == found[1] == found[2]
    assert found[0][0] != found[0][1], "another order in another epoch"


@pytest.mark.parametrize("turns", ["last", "all"])
def test_processes_that_tokenize_change_nothing(
    turns: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "BLOCK", 7)  # several blocks for each
    talk = [{"role": role, "content": f"{role}"} for role in ("user", "assistant", "user", "assistant")]
    rows: list[Any] = [
        {"messages": [{**x, "content": f"{x['content']} {i} {j}"} for j, x in enumerate(talk)]} for i in range(50)
    ]
    rows[20] = {"messages": talk[:1]}
    rows[44] = {"messages": []}
    file = tmp_path / "f.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for workers in (1, 3):
        options = {"assistant_turns": turns, "prepare_workers": workers, "cache": str(tmp_path / f"c{workers}")}
        data = AlignmentData(str(file), on_bad_row="skip", chat_template="plain", **options)
        data.needs = DataNeeds("sft", False, str(tiny_model), 260, 128)
        data.setup("fit")
        dataset = data.datasets["train"]
        rows_of = [(str(x.origin), x.prompt.tolist(), x.completion.tolist()) for x in dataset.examples()]
        found.append((rows_of, dataset.bad, dataset.report))
    assert found[0] == found[1]
    assert len(found[0][0]) == 48 * (1 + (turns == "all"))
    assert [row for _, row, _ in found[0][1]] == [21, 45]
