"""The counts of the twelve rows, all by hand; and lengths of real data against a count of our own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

LIMITS = ("--data.max_length", "48", "--data.batch_size", "10")


@pytest.fixture
def facts(inspected: Any, rows_file: Path) -> Any:
    status, found = inspected(rows_file, *LIMITS)
    assert status == 1  # two rows are bad
    return found


def test_rows_and_classes(facts: Any, rows_file: Path) -> None:
    assert facts["sources"] == [{"name": str(rows_file), "records": 10, "bad": 2}]
    assert (facts["kind"], facts["rows"], facts["completions"]) == ("labelled", 10, 10)
    assert facts["objective"] == {"name": "KTO", "inferred": True}
    assert facts["classes"] == {"desirable": 6, "undesirable": 4, "share": 0.6}
    assert facts["bad_rows"]["rows"] == 2
    first, second = facts["bad_rows"]["listed"]
    assert first.startswith(f"{rows_file}:11: label: missing (did you mean 'lable'?)")
    assert second.startswith(f"{rows_file}:12: completion: ")


def test_the_advised_weights(facts: Any, inspected: Any, rows_file: Path) -> None:
    """n_D : n_U is 1.5, above 4/3."""
    weights = facts["weights"]
    assert weights["desirable_weight"] == pytest.approx([2 / 3, 8 / 9])
    assert weights["undesirable_weight"] == pytest.approx([9 / 8, 3 / 2])
    assert weights["equal"] == {"ratio": 1.5, "inside": False}
    assert weights["in_use"] == {"desirable": 1.0, "undesirable": 1.0, "ratio": 1.5, "inside": False}
    options = ("--objective", "KTO", "--objective.undesirable_weight", "1.2")
    used = inspected(rows_file, *options)[1]["weights"]["in_use"]
    assert used == {"desirable": 1.0, "undesirable": 1.2, "ratio": pytest.approx(1.25), "inside": True}
    halves = inspected(rows_file, "--data.sampler", "stratified")[1]["weights"]
    assert halves["stratified"]
    assert halves["equal"] == {"ratio": 1.0, "inside": True}


def test_lengths(facts: Any) -> None:
    """Nearest ranks: of ten values the 5th is the median, the first the 5 % and the last the 95 %."""
    order = ("min", "p5", "p50", "p95", "p99", "max")
    told = {name: tuple(x[key] for key in order) for name, x in facts["lengths"].items()}
    assert told == {
        "prompt": (4, 4, 14, 38, 38, 38),
        "completion": (2, 2, 7, 61, 61, 61),
        "desirable": (2, 2, 7, 24, 24, 24),
        "undesirable": (7, 7, 21, 61, 61, 61),
        "whole": (10, 10, 21, 67, 67, 67),
    }


def test_truncation_and_tokens(facts: Any) -> None:
    """Row 6 loses 14 tokens of its prompt, row 7 19 of its completion; both then have 48."""
    assert facts["truncation"] == {
        "max_length": 48,
        "max_prompt_length": 24,
        "limited_by_model": False,
        "rows": 2,
        "share": 0.2,
        "prompts": 1,
        "completions": 1,
        "cuts_nothing": 67,
        "cuts_one_percent": 67,
    }
    assert facts["tokens"] == 4 * 21 + 10 + 48 + 48 + 16 + 36 + 35


def test_padding(facts: Any, inspected: Any, rows_file: Path) -> None:
    """All rows in one micro-batch of 48 columns."""
    empty = pytest.approx(1 - 277 / 480)
    assert facts["padding"] == {"batch_size": 10, "shuffle": empty, "group_by_length": empty}
    small = inspected(rows_file, "--data.max_length", "48", "--data.batch_size", "2")[1]["padding"]
    assert small["group_by_length"] == pytest.approx(1 - 277 / (2 * (48 + 36 + 21 + 21 + 16)))
    assert small["shuffle"] > small["group_by_length"]


def test_length_by_class(facts: Any, inspected: Any, write: Any) -> None:
    """Desirable: 7, 7, 7, 2, 24, 7; undesirable: 7, 61, 21, 31: 2 of 24 couples are won and 4 tie."""
    x = facts["length_by_class"]
    assert x["longer"] == pytest.approx((2 + 4 / 2) / 24)
    assert (x["median_desirable"], x["median_undesirable"]) == (7, 21)
    assert x["errors"] == pytest.approx((0.5 - 1 / 6) / math.sqrt(11 / (12 * 24)))
    pairs = [{"prompt": "p", "chosen": "a" * n, "rejected": "b" * m} for n, m in ((2, 5), (5, 2), (6, 2), (3, 3))]
    told = inspected(write(*pairs))[1]["length_by_class"]
    assert (told["chosen_longer"], told["chosen_shorter"], told["equal"]) == (0.5, 0.25, 0.25)
    assert told["longer"] == 0.625
    assert told["errors"] == pytest.approx(0.125 / (math.sqrt(3) / 2 / 4))


def test_findings(facts: Any, rows_file: Path) -> None:
    assert facts["prompts"] == {
        "distinct": 7,
        "mean_rows": pytest.approx(10 / 7),
        "max_rows": 4,
        "largest_share": 0.4,
        "largest_example": f"{rows_file}:1",
    }
    assert facts["duplicates"] == {"rows": 1, "examples": [[f"{rows_file}:1", f"{rows_file}:3"]]}
    assert facts["contradictions"] == {"rows": 1, "examples": [[f"{rows_file}:4", f"{rows_file}:2"]]}
    assert facts["one_token_completions"] == {"rows": 1, "examples": [f"{rows_file}:5"]}
    assert facts["special_tokens_in_plain_prompts"] == {"rows": 1, "examples": [f"{rows_file}:8"]}
    assert facts["repeated_prompts"] == {"rows": 1, "examples": [f"{rows_file}:9"]}
    assert facts["plain_prompts"] == 10


def test_histograms_hold_all_rows(facts: Any) -> None:
    assert facts["histograms"]["desirable"]["begin"] == facts["histograms"]["undesirable"]["begin"] == 2
    sums = {name: sum(x["counts"]) for name, x in facts["histograms"].items()}
    assert sums == {"prompt": 10, "desirable": 6, "undesirable": 4, "whole": 10}
    counts = facts["histograms"]["prompt"]["counts"]  # 4 to 38, one token a bar
    assert (counts[0], counts[2], counts[10], counts[34]) == (1, 1, 4, 1)


def test_a_pair_has_one_prompt(inspected: Any, write: Any) -> None:
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    _, facts = inspected(write(pair, {**pair, "prompt": "q"}, {**pair, "prompt": "</s>r"}))
    sums = {name: sum(x["counts"]) for name, x in facts["histograms"].items()}
    assert sums == {"prompt": 3, "chosen": 3, "rejected": 3, "whole": 6}
    assert facts["plain_prompts"] == 3
    assert facts["special_tokens_in_plain_prompts"]["rows"] == 1


def test_chats_in_thumbs(inspected: Any, shared_data: Path) -> None:
    """229 rows, 118 of them true; their lengths, counted here from the raw rows."""
    path, folder = shared_data / "binary" / "chat_kto_en.jsonl", shared_data / "tokenizers" / "gpt2"
    status, facts = inspected(path, "--data.tokenizer", str(folder), "--data.chat_template", "chatml")
    assert status == 0
    assert facts["classes"] == {"desirable": 118, "undesirable": 111, "share": 118 / 229}
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    turns = [[f"<|im_start|>{x['role']}\n{x['content']}<|im_end|>\n" for x in row["prompt"]] for row in rows]
    before = np.array([tokens("".join(x) + "<|im_start|>assistant\n") for x in turns])
    after = np.array([tokens(row["completion"][0]["content"] + "<|im_end|>\n") + 1 for row in rows])
    label = np.array([row["label"] for row in rows])
    parts = (before, after, after[label], after[~label], before + after)
    for name, x in zip(("prompt", "completion", "desirable", "undesirable", "whole"), parts, strict=True):
        ranked = np.sort(x)
        expected = {f"p{p}": int(ranked[math.ceil(p / 100 * len(x)) - 1]) for p in (5, 50, 95, 99)}
        assert facts["lengths"][name] == {"min": ranked[0], **expected, "max": ranked[-1]}, name
    assert facts["truncation"]["rows"] == int((before + after > 1024).sum())
    assert facts["weights"]["equal"]["inside"]
    assert facts["plain_prompts"] == 0


def test_sentences_with_empty_prompts(inspected: Any, shared_data: Path) -> None:
    """1999 rows, 692 of them true: KTO would find no y′."""
    path = shared_data / "binary" / "blimp_acceptability.jsonl"
    status, facts = inspected(path, "--data.tokenizer", str(shared_data / "tokenizers" / "gpt2"))
    assert status == 0
    assert facts["classes"] == {"desirable": 692, "undesirable": 1307, "share": 692 / 1999}
    assert facts["prompts"]["distinct"] == 1
    assert facts["lengths"]["prompt"]["max"] == 1
    assert facts["special_tokens_in_plain_prompts"]["rows"] == 0
    assert facts["weights"]["desirable_weight"] == pytest.approx([1307 / 692, 4 / 3 * 1307 / 692])
    assert "one_prompt" in [x["kind"] for x in facts["warnings"]]


def test_pairs_of_sentences(inspected: Any, shared_data: Path) -> None:
    """3996 pairs; three of them prefer a sentence to itself, as a look at their lines shows."""
    path = shared_data / "paired" / "blimp_prefix.jsonl"
    status, facts = inspected(path, "--data.tokenizer", str(shared_data / "tokenizers" / "gpt2"))
    assert (status, facts["kind"], facts["rows"], facts["completions"]) == (0, "pairs", 3996, 7992)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    same = [f"{path}:{i}" for i, row in enumerate(rows, 1) if row["chosen"] == row["rejected"]]
    assert facts["undecided_pairs"] == {"rows": len(same), "examples": [[x] for x in same[:3]]}
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")
    both = [[len(ids) + 1 for ids in tokenizer([row[x] for row in rows])["input_ids"]] for x in ("chosen", "rejected")]
    longer = np.mean(np.array(both[0]) > np.array(both[1]))
    assert facts["length_by_class"]["chosen_longer"] == pytest.approx(longer)
    assert facts["lengths"]["chosen"]["max"] == max(both[0])
    assert facts["classes"] is None
    assert facts["weights"] is None
