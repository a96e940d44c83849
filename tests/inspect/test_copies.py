"""Duplicates and contradictions of pairs; those of single completions are among the twelve rows."""

from __future__ import annotations

from typing import Any


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_pairs(inspected: Any, write: Any) -> None:
    """A completion may win one pair and lose another; the same two both ways are a contradiction."""
    path = write(
        pair("p", "best", "good"),
        pair("p", "good", "poor"),
        pair("p", "good", "best"),
        pair("q", "good", "best"),
        pair("p", "best", "good"),
        pair("r", "same", "same"),
    )
    _, facts = inspected(path)
    assert facts["duplicates"] == {"rows": 1, "examples": [[f"{path}:1", f"{path}:5"]]}
    assert facts["contradictions"]["rows"] == 1
    assert set(facts["contradictions"]["examples"][0]) == {f"{path}:1", f"{path}:3"}
    assert facts["undecided_pairs"] == {"rows": 1, "examples": [[f"{path}:6"]]}
    assert facts["prompts"]["distinct"] == 3
    assert facts["prompts"]["max_rows"] == 4


def test_at_most_three_examples(inspected: Any, write: Any) -> None:
    row = {"prompt": "p", "completion": "c", "label": True}
    path = write(*[row] * 6, {**row, "prompt": "q", "label": False})
    _, facts = inspected(path)
    assert facts["duplicates"]["rows"] == 5
    assert facts["duplicates"]["examples"] == [[f"{path}:1", f"{path}:{i}"] for i in (2, 3, 4)]


def test_a_weight_makes_no_duplicates(inspected: Any, write: Any) -> None:
    path = write({"prompt": "p", "completion": "c", "label": True}, {"prompt": "q", "completion": "d", "label": False})
    _, facts = inspected(f"{{path: {path}, weight: 3}}")
    assert facts["rows"] == 6
    assert facts["duplicates"]["rows"] == 0
