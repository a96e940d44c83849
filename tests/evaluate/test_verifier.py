"""Verifiers by import path, and what is told of those that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halos_pl.data.records import DataError, Origin
from halos_pl.evaluate.prompts import Prompt
from halos_pl.evaluate.verifier import find_verifier, verdict
from halos_pl.nano import granted

PROMPT = Prompt("a", np.array([1], np.int32), {"prompt": "a", "limit": 3}, Origin("held_out.jsonl", 4))


def test_a_function_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # restores sys.path afterwards
    Path("checks_of_mine.py").write_text("def short(row, text): return len(text) <= row['limit']\nlimit = 3\n")
    short = find_verifier("checks_of_mine.short")
    assert [verdict(short, PROMPT, text) for text in ("abc", "abcd")] == [True, False]
    assert find_verifier("halos_pl.nano.granted") is granted
    with pytest.raises(ValueError, match=r"'checks_of_mine.limit': a int, not a function; expected module.function"):
        find_verifier("checks_of_mine.limit")
    Path("broken_of_mine.py").write_text("def f(:\n")
    with pytest.raises(ValueError, match=r"'broken_of_mine.f': SyntaxError: "):
        find_verifier("broken_of_mine.f")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("halos_pl.nano.grantd", "AttributeError: module 'halos_pl.nano' has no attribute 'grantd'"),
        ("no_such_module.f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("granted", "no import path; expected module.function"),
        ("./checks.py", "no import path"),
        ("checks.py:f", "no import path"),
        ("", "no import path"),
    ],
)
def test_paths_that_lead_nowhere(path: str, told: str) -> None:
    with pytest.raises(ValueError, match=r"^evaluation.verifier") as error:
        find_verifier(path)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("verifier", "told"),
    [
        (lambda row, text: row["nokey"], "fails on held_out.jsonl:4: KeyError: 'nokey'"),
        (lambda row: True, "fails on held_out.jsonl:4: TypeError"),
        (lambda row, text: "yes", "returns 'yes' on held_out.jsonl:4; expected True or False"),
        (lambda row, text: None, "returns None on held_out.jsonl:4"),
        (lambda row, text: 1.0, "returns 1.0"),
    ],
)
def test_verifiers_that_fail(verifier: Any, told: str) -> None:
    with pytest.raises(DataError) as error:
        verdict(verifier, PROMPT, "b")
    assert told in str(error.value)
    assert verdict(lambda row, text: np.bool_(True), PROMPT, "b") is True
