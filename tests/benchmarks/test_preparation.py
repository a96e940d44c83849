"""The benchmark of preparing data runs, counts what it says, and its gate closes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def preparation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.preparation")


def run(preparation: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["preparation", *arguments])
    preparation.main()


def test_a_small_run(
    preparation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    run(preparation, monkeypatch, "--rows", "50", "--trl-rows", "0", "--chat", "--gate", "--out", str(out))
    report = json.loads(out.read_text())
    assert {job: x["rows"] for job, x in report["runs"].items()} == {"ours": 50, "ours, again": 50}
    assert 100 < report["runs"]["ours"]["peak_mib"] < 2048
    assert report["settings"]["format"] == "conversational"
    assert "| ours, again | 50 |" in capsys.readouterr().out


def test_what_a_child_does_needs_no_trl(preparation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert preparation.parse(["--job", "ours", "--file", "rows.jsonl"]).file == "rows.jsonl"
    with pytest.raises(SystemExit):
        preparation.parse([])


def test_the_gate(preparation: Any) -> None:
    def report(peak: float, again: float, ours: float) -> dict[str, object]:
        return {
            "runs": {
                "ours": {"peak_mib": peak, "rows_per_s": 1.0},
                "ours, again": {"setup_s": again},
                "ours, first rows": {"rows_per_s": ours},
                "TRL, first rows": {"rows_per_s": 100.0},
            }
        }

    assert preparation.missed(report(2000, 4, 201)) == []
    assert [x.split()[0] for x in preparation.missed(report(3000, 6, 199))] == ["peak", "second", "1.99"]


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--rows", "5", "--trl-rows", "6"]])
def test_impossible_sizes(preparation: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preparation.parse(arguments)
    assert "--rows must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_rows(preparation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    run(preparation, monkeypatch, "--gate", "--out", str(tmp_path / "report.json"))
