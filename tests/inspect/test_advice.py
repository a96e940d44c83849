"""Which facts earn a warning, and what it says to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halos_pl.__main__ import main


def labelled(sizes: list[int], label: bool) -> list[dict[str, Any]]:
    letter = "a" if label else "b"
    return [{"prompt": f"p{i}{letter}", "completion": letter * n, "label": label} for i, n in enumerate(sizes)]


def kinds(facts: Any) -> dict[str, str]:
    return {x["kind"]: x["level"] for x in facts["warnings"]}


def remedy(facts: Any, kind: str) -> str:
    return str(next(x["remedy"] for x in facts["warnings"] if x["kind"] == kind))


def test_the_twelve_rows(inspected: Any, rows_file: Path) -> None:
    _, facts = inspected(rows_file, "--data.max_length", "48", "--data.batch_size", "10")
    assert kinds(facts) == {
        **dict.fromkeys(("bad_rows", "contradictions", "weights", "truncation", "duplicates"), "warning"),
        **dict.fromkeys(("one_token_completions", "special_tokens"), "warning"),
        "repeated_prompts": "note",
    }
    assert [x["level"] for x in facts["warnings"]] == ["warning"] * 7 + ["note"]  # warnings come first
    assert all(x["text"] and x["remedy"] for x in facts["warnings"])
    assert "--data.max_length: 67 cuts nothing" in remedy(facts, "truncation")


def test_rows_without_a_fault(inspected: Any, write: Any) -> None:
    path = write(*labelled([10, 20, 30], True), *labelled([10, 20, 30], False))
    assert inspected(path)[1]["warnings"] == []
    assert "nothing to warn of" in inspected(path, text=True)[1]


def test_weights_are_ones_that_training_does_not_warn_of(inspected: Any, write: Any) -> None:
    """The class that weighs less gets more; the weights advised bring the ratio to 1 and to 4/3."""
    few = inspected(write(*labelled([9] * 2, True), *labelled([9] * 7, False)))[1]
    assert remedy(few, "weights") == "--model.objective.desirable_weight 3.5 to 4.66 (with 1 for the other class)"
    many = inspected(write(*labelled([9] * 7, True), *labelled([9] * 3, False)))[1]
    assert remedy(many, "weights") == "--model.objective.undesirable_weight 1.75 to 2.33 (with 1 for the other class)"
    inside = inspected(write(*labelled([9] * 4, True), *labelled([9] * 3, False)))[1]
    assert "weights" not in kinds(inside)


def test_one_class(inspected: Any, write: Any, capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    path = write(*labelled([5, 6], True))
    facts = inspected(path)[1]
    assert kinds(facts)["one_class"] == "warning"
    assert "SFT" in remedy(facts, "one_class")
    assert facts["weights"] is None
    main(["data", "inspect", "--data.train", str(path), "--data.tokenizer", str(tiny_model)])
    assert "push one way" not in capsys.readouterr().err  # once, in the report
    assert "SFT" not in remedy(inspected(write(*labelled([5, 6], False)))[1], "one_class")


@pytest.mark.parametrize(
    ("good", "bad", "kind"),
    [
        (range(10, 40), range(50, 80), "shorter"),
        (range(50, 80), range(10, 40), "longer"),
        (range(10, 40), range(12, 42), None),
        (range(10, 12), range(50, 52), None),  # four rows prove nothing
    ],
)
def test_lengths_that_tell_the_classes_apart(inspected: Any, write: Any, good: Any, bad: Any, kind: str | None) -> None:
    rows = labelled(list(good), True) + labelled(list(bad), False)
    assert {x for x in kinds(inspected(write(*rows))[1]) if x in ("shorter", "longer")} == ({kind} - {None})
    pairs = [
        {"prompt": f"p{i}", "chosen": "a" * n, "rejected": "b" * m}
        for i, (n, m) in enumerate(zip(good, bad, strict=True))
    ]
    found = {x for x in kinds(inspected(write(*pairs))[1]) if x in ("shorter", "longer")}
    assert found == (set() if len(good) == 2 else {"shorter"} if kind is None else {kind})


def test_a_prompt_that_has_most_rows(inspected: Any, write: Any) -> None:
    rows = [{"prompt": "p", "completion": f"c{i}", "label": i % 2 == 0} for i in range(6)]
    one = inspected(write(*rows))[1]
    assert kinds(one)["one_prompt"] == "warning"
    assert "reference_point false" in remedy(one, "one_prompt")
    free = inspected(write(*rows), "--objective", "KTO", "--objective.reference_point", "false")[1]
    assert "one_prompt" not in kinds(free)
    most = inspected(write(*rows, {"prompt": "q", "completion": "c", "label": True}))[1]
    assert kinds(most)["one_prompt"] == "note"


def test_padding(inspected: Any, write: Any) -> None:
    rows = labelled([10, 110] * 32, True) + labelled([10, 110] * 32, False)
    facts = inspected(write(*rows))[1]
    assert kinds(facts)["padding"] == "note"
    assert facts["padding"]["shuffle"] > 0.3
    assert remedy(facts, "padding").startswith("--data.group_by_length true: ")


def test_truncation_by_the_models_positions(inspected: Any, write: Any, tiny_model: Path) -> None:
    rows = labelled([200, 9], True) + labelled([300, 9], False)
    facts = inspected(write(*rows), "--model.policy", str(tiny_model))[1]
    assert facts["truncation"]["rows"] == 2
    assert "model of more positions" in remedy(facts, "truncation")
