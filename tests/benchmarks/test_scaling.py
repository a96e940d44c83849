"""The formulas of `estimate` are what two ranks hold and send, and what autograd keeps; the document is in step."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scaling() -> Any:
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.scaling")
    sys.path.remove(str(ROOT))


def test_two_ranks_hold_and_send_what_the_formulas_say(scaling: Any) -> None:
    small = {"rows": 1, "length": 16, "scored": 5, "repeats": 1}
    cases = {"plain": small, "two": {**small, "accumulate": 2, "checkpointing": True}}
    if importlib.util.find_spec("peft"):
        cases["LoRA"] = {**small, "lora": 3}
    rows = list(scaling.on_ranks(2, cases))
    exact = [x for x in rows if x["quantity"] != "peak"]
    assert len(exact) == 11 * len(cases)
    for x in exact:
        assert x["measured"] == x["predicted"], x
    assert {x["quantity"]: x["measured"] for x in exact if "two" in x["case"]}["accumulated"] > 0


def test_autograd_keeps_what_the_formulas_say(scaling: Any) -> None:
    if not importlib.util.find_spec("peft"):
        pytest.skip("peft is not installed")
    found = {x["case"]: x["ratio"] for x in scaling.of_autograd("cpu")}
    assert found["float32, plain"] == found["bfloat16, plain"] == 1
    assert all(0.97 < x < 1.002 for x in found.values()), found


def test_the_document_is_in_step(scaling: Any) -> None:
    tables = importlib.import_module("benchmarks.scaling_tables")
    text = tables.DOCUMENT.read_text(encoding="utf-8")
    assert tables.rewritten(text) == text, "python -m benchmarks.scaling --tables"
    with pytest.raises(ValueError, match="0 places for the table 'models'"):
        tables.rewritten("")


def test_sentences_of_the_document(scaling: Any) -> None:
    """Figures that stand in its text."""
    tables = importlib.import_module("benchmarks.scaling_tables")
    text = tables.DOCUMENT.read_text(encoding="utf-8")
    parameters = {name: tables.shapes(name).numel for name in tables.MODELS}
    whole = ", ".join(
        f"{4 * n / 2**30:{'.1f' if name == '1B' else '.0f'}} GiB for {name}" for name, n in parameters.items()
    )
    assert whole in text
    held = tables.memory(tables.shapes("70B"), tables.plan(64, 32))
    assert f"({held.total / 2**30:.0f} GiB, six rows" in text
    assert tables.largest_rows(tables.shapes("70B"), tables.plan(64, 32), tables.LIMIT) == 6
    assert tables.largest_rows(tables.shapes("70B"), tables.plan(64, 16), tables.LIMIT) == 0


def test_what_was_measured_is_within_the_limits(scaling: Any) -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "scaling-cpu.json").read_text(encoding="utf-8"))
    assert scaling.wrong(report) == []
    report["rows"][-2]["measured"] += 1
    report["rows"][-2]["ratio"] = 1.1
    assert len(scaling.wrong(report)) == 1
