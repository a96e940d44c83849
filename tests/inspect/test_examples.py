"""Examples: which rows, and what is shown of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halos_pl.inspect.examples import pieces


def shown(part: Any) -> str:
    return "".join(x.get("text", "…") for x in part["pieces"])


def test_which_rows(inspected: Any, rows_file: Path) -> None:
    """Typical of its class (a median of 21 desirable and of 36 tokens), then the first that is cut, then drawn ones."""
    _, facts = inspected(rows_file, "--data.max_length", "48")
    assert [(x["place"], x["why"]) for x in facts["examples"]] == [
        (f"{rows_file}:1", "desirable, of typical length"),
        (f"{rows_file}:10", "undesirable, of typical length"),
        (f"{rows_file}:6", "the first that is cut"),
    ]
    _, longer = inspected(rows_file)
    assert (longer["examples"][2]["place"], longer["examples"][2]["why"]) == (f"{rows_file}:7", "the longest")
    _, many = inspected(rows_file, "--examples", "50")
    assert sorted(int(x["place"].rsplit(":", 1)[1]) for x in many["examples"]) == list(range(1, 11))
    assert many == inspected(rows_file, "--examples", "50")[1]  # the same every time


def test_what_is_shown(inspected: Any, rows_file: Path) -> None:
    _, facts = inspected(rows_file, "--data.max_length", "48")
    whole, _, cut = facts["examples"]
    prompt, completion = whole["parts"]
    assert (prompt["name"], prompt["tokens"], prompt["cut"], shown(prompt)) == ("prompt", 14, 0, "What is 2 + 2?")
    assert (completion["name"], completion["tokens"], shown(completion)) == ("desirable", 7, " Four.</s>")
    assert [x["kind"] for x in completion["pieces"]] == ["text"] * 6 + ["eos"]
    prompt, _ = cut["parts"]
    assert (prompt["tokens"], prompt["cut"]) == (24, 14)
    assert shown(prompt) == "Tell me a long story about the old sea"[14:]


def test_a_long_part_is_elided(inspected: Any, write: Any) -> None:
    path = write(
        {"prompt": "x" * 140, "completion": "y" * 500, "label": True},
        {"prompt": "x" * 160, "completion": "z", "label": False},
    )
    _, facts = inspected(path, "--data.max_length", "400", "--data.max_prompt_length", "150")
    first, second = (x["parts"] for x in facts["examples"])
    assert shown(first[0]) == "x" * 140
    assert (first[1]["tokens"], first[1]["cut"]) == (260, 241)
    assert [x["left_out"] for x in first[1]["pieces"] if "left_out" in x] == [80]
    assert len(first[1]["pieces"]) == 120 + 1 + 60
    assert all(x.get("kind") != "eos" for x in first[1]["pieces"])  # it was cut off
    assert [x["left_out"] for x in second[0]["pieces"] if "left_out" in x] == [20]


def test_pairs_show_both(inspected: Any, write: Any) -> None:
    _, facts = inspected(write({"prompt": "p", "chosen": "good", "rejected": "bad"}))
    assert [x["name"] for x in facts["examples"][0]["parts"]] == ["prompt", "chosen", "rejected"]
    assert [shown(x) for x in facts["examples"][0]["parts"]] == ["p", "good</s>", "bad</s>"]


@pytest.mark.parametrize("text", ["plain words", "naïve café 🦜🦜 日本語", "a\n\n b\t", "\N{REPLACEMENT CHARACTER}x"])
def test_pieces_make_up_the_text(tiny_model: Path, text: str) -> None:
    """A character of four bytes is four tokens: the last one shows it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text
