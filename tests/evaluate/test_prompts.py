"""Prompts of any kind of row, and texts to score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halos_pl.data.prepare import Preparation
from halos_pl.data.records import DataError
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.tokenizers import load_tokenizer
from halos_pl.evaluate.prompts import load_prompts, load_text

USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.fixture
def encoder(tiny_model: Path) -> CompletionTokenizer:
    return CompletionTokenizer(load_tokenizer(str(tiny_model)), chat_template="plain")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_of_all_kinds_of_rows(encoder: CompletionTokenizer, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "value": 3},
        {"prompt": "a", "completion": "b", "label": True},
        {"messages": [USER, REPLY]},
        {"chosen": [USER, REPLY], "rejected": [USER, USER, REPLY]},
        {"prompt": [{"role": "system", "content": "s"}, USER]},
    ]
    rows[3]["rejected"] = [USER, REPLY | {"content": "c"}]
    found = load_prompts(write(tmp_path / "rows.jsonl", rows), encoder)
    assert [x.row for x in found] == rows
    decoded = [encoder.tokenizer.decode(x.tokens) for x in found]
    assert decoded == ["a", "a", "a\n\n", "a\n\n", "s\n\na\n\n"]
    assert [x.last_turn for x in found] == ["a"] * 5


def test_limit_and_split(encoder: CompletionTokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "split": "test" if i % 2 else "train"} for i in range(6)]
    source = write(tmp_path / "rows.jsonl", rows)
    assert [x.text for x in load_prompts(source, encoder, split="test")] == ["1", "3", "5"]
    assert [x.text for x in load_prompts(source, encoder, split="test", limit=2)] == ["1", "3"]


def test_bad_rows_beyond_the_limit_are_not_read(encoder: CompletionTokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"promt": "b"}])
    assert len(load_prompts(source, encoder, limit=1)) == 1
    with pytest.raises(DataError, match=r"rows.jsonl:2: prompt: missing"):
        load_prompts(source, encoder)
    assert len(load_prompts(source, encoder, on_bad_row="skip")) == 1


def test_no_prompts_and_no_text(encoder: CompletionTokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "label": False}])
    with pytest.raises(DataError, match="all completions are labelled undesirable: no text to score"):
        load_text(source, Preparation(encoder))
    with pytest.raises(DataError, match="no prompts"):
        load_prompts(write(tmp_path / "bad.jsonl", [{"completion": "b"}]), encoder, on_bad_row="skip")


def test_text_is_the_desirable_side(encoder: CompletionTokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": x, "label": x != "no"} for x in ("one", "no", "two", "three")]
    found = load_text(write(tmp_path / "rows.jsonl", rows), Preparation(encoder), limit=2)
    assert [encoder.tokenizer.decode(y) for _, y in found] == ["one</s>", "two</s>"]
