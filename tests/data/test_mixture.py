"""Mixtures: how many rows of each source, which ones, and which are held out."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from halos_pl.data.mixture import held_out, repeats, select
from halos_pl.data.prepare import Prepared
from halos_pl.data.sources import Source


def mixture(*sources: tuple[int, int | None, float], seed: int = 0, weighted: bool = True) -> list[list[int]]:
    """Rows of each source, by its size, limit and weight."""
    prepared: Any = [Prepared(Source(f"{i}.jsonl", limit=x, weight=y), [], []) for i, (_, x, y) in enumerate(sources)]
    found = select(prepared, [n for n, _, _ in sources], seed=seed, weighted=weighted)
    ends = np.cumsum([0, *(n for n, _, _ in sources)])
    return [[int(i - a) for i in found if a <= i < b] for a, b in pairwise(ends)]


def test_all_rows_in_their_order() -> None:
    assert mixture((3, None, 1.0), (2, None, 1.0)) == [[0, 1, 2], [0, 1]]


def test_a_limit_draws_rows_by_the_seed() -> None:
    (few,), (more,), (other,) = mixture((100, 10, 1.0)), mixture((100, 20, 1.0)), mixture((100, 10, 1.0), seed=1)
    assert len(few) == 10
    assert few == sorted(set(few))
    assert set(few) < set(more), "a smaller limit is part of a larger one"
    assert few != other
    assert few != list(range(10))
    assert mixture((5, 10, 1.0)) == [[0, 1, 2, 3, 4]]
    first, second = mixture((100, 10, 1.0), (100, 10, 1.0))
    assert first != second


def test_weights_repeat_rows_when_training() -> None:
    rows, half, thrice = mixture((10, None, 2.0), (10, None, 0.5), (10, 4, 2.5))
    assert rows == sorted([*range(10)] * 2)
    assert len(half) == len(set(half)) == 5
    assert len(set(thrice)) == 4
    assert len(thrice) == 10
    assert mixture((10, None, 2.0), (10, None, 0.5), weighted=False) == [[*range(10)]] * 2
    assert [len(x) for x in mixture((10, None, 0.001), (10, None, 1.0))] == [1, 10], "no source vanishes"


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_prompts_are_held_out_whole_and_in_every_run(share: float) -> None:
    prompts = [hashlib.blake2b(str(i // 3).encode(), digest_size=16).digest() for i in range(6000)]
    keys = np.frombuffer(b"".join(prompts), np.uint8).reshape(-1, 16)
    corpus: Any = SimpleNamespace(keys={"opening": keys}.__getitem__)
    out = held_out(corpus, np.arange(6000), share)
    assert (out.reshape(-1, 3) == out[::3, None]).all(), "a prompt is on one side"
    assert abs(out.mean() - share) < 5 * np.sqrt(share * (1 - share) / 2000)
    assert (held_out(corpus, np.arange(3000, 6000), share) == out[3000:]).all(), "whatever the other rows are"
    assert (out <= held_out(corpus, np.arange(6000), min(1.0, share + 0.1))).all()


def test_duplicates_and_contradictions() -> None:
    prompts = np.array([0, 0, 0, 0, 1, 1, 2])
    completions = np.array([0, 0, 0, 1, 0, 2, 2])
    labels = np.array([1, 1, 0, 0, 1, -1, -1])
    assert repeats(prompts, completions, labels) == (1, 1)
    assert repeats(prompts[:0], completions[:0], labels[:0]) == (0, 0)
    assert repeats(np.array([0, 1]), np.array([1, 0]), np.array([1, 1])) == (0, 0)


def test_a_mixture_of_files_trains_on_all_of_them(tiny_model: Path, thumbs_file: Path, pairs_file: Path) -> None:
    from halos_pl.batch import DataNeeds
    from halos_pl.data import AlignmentData
    from halos_pl.data.sources import Source

    sources: list[Source | str] = [
        str(thumbs_file),
        Source(str(pairs_file), limit=10),
        Source(str(pairs_file), weight=0.5),
    ]
    data = AlignmentData(train=sources, batch_size=4)
    data.needs = DataNeeds("unpaired", mismatched=True, tokenizer=str(tiny_model), vocab_size=260, max_positions=None)
    data.setup("fit")
    files = [data.datasets["train"].example(i).origin.file for i in range(len(data.datasets["train"]))]
    assert files.count(str(thumbs_file)) == 96
    assert files.count(str(pairs_file)) == 2 * 10 + 96


def test_a_share_of_the_prompts_is_held_out(tiny_model: Path, thumbs_file: Path) -> None:
    from halos_pl.batch import DataNeeds
    from halos_pl.data import AlignmentData

    data = AlignmentData(train=str(thumbs_file), validation_share=0.3, batch_size=4)
    data.needs = DataNeeds("unpaired", mismatched=True, tokenizer=str(tiny_model), vocab_size=260, max_positions=None)
    data.setup("fit")
    train, validation = (
        {str(data.datasets[part].example(i).origin) for i in range(len(data.datasets[part]))}
        for part in ("train", "validation")
    )
    assert len(train | validation) == 96
    assert not train & validation
    assert 0.1 < len(validation) / 96 < 0.5
    assert not set(data.datasets["train"].prompt_digests) & set(data.datasets["validation"].prompt_digests)


def test_a_conversation_is_held_out_whole(tiny_model: Path, tmp_path: Path) -> None:
    """With each reply as a row, and with longer conversations of the same beginning."""
    import json

    from halos_pl.batch import DataNeeds
    from halos_pl.data import AlignmentData

    def said(number: int, turns: int) -> list[dict[str, str]]:
        words = [f"q{number}", *(f"{role}{i}" for i in range(turns) for role in "aq")][: 2 * turns]
        return [{"role": role, "content": x} for role, x in zip(("user", "assistant") * turns, words, strict=True)]

    rows = [{"messages": said(i % 40, 1 + i % 3)} for i in range(120)]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = AlignmentData(train=str(file), validation_share=0.3, assistant_turns="all", chat_template="plain")
    data.needs = DataNeeds("sft", mismatched=False, tokenizer=str(tiny_model), vocab_size=260, max_positions=None)
    data.setup("fit")
    begin = [
        {rows[x.origin.row - 1]["messages"][0]["content"] for x in data.datasets[part].examples()}
        for part in ("train", "validation")
    ]
    assert not begin[0] & begin[1]
    assert len(begin[0] | begin[1]) == 40


def test_a_split_of_what_is_trained_on_counts_once() -> None:
    from halos_pl.data import AlignmentData

    data = AlignmentData(train=Source("a.jsonl", weight=2.0), train_split="train", validation_split="test")
    assert data.sources["train"] == [Source("a.jsonl", split="train", weight=2.0)]
    assert data.sources["validation"] == [Source("a.jsonl", split="test")]


def test_weights_of_rows_that_count_once_are_refused() -> None:
    from halos_pl.data import AlignmentData

    with pytest.raises(ValueError, match=r"validation: b.jsonl has weight 0.5, which is for training; give a limit"):
        AlignmentData(train="a.jsonl", validation=Source("b.jsonl", weight=0.5))
