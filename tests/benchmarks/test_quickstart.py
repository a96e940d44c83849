"""The command behind the README's table, with a few steps a run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

SHORT = ["--fit", "--trainer.max_steps", "2", "--evaluation.limit", "8", "--trainer.limit_val_batches", "1"]


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    return importlib.import_module("benchmarks.quickstart")


def test_a_short_table(quickstart: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quickstart.json"
    argv = ["--out", str(out), "--seeds", "1", "--only", "KTO", "--work", str(tmp_path / "runs"), *SHORT]
    assert quickstart.main(argv) == 0
    results = json.loads(out.read_text())
    (row,) = results["rows"]
    assert (row["method"], row["seed"]) == ("KTO", 1)
    assert row["before"]["samples/kl"] == 0 != row["after"]["samples/kl"]
    assert {"git_commit", "versions", "device", "date", "command"} <= set(results)
    printed = capsys.readouterr().out
    assert quickstart.table(results) in printed
    assert "| KTO | 1 | " in printed
    assert quickstart.main(argv) == 0, "what is there is not run again"
    assert json.loads(out.read_text()) == results


def test_the_table_by_hand(quickstart: Any) -> None:
    def figures(share: float, kl: float) -> dict[str, float]:
        ends = {"samples/verified_low": share - 0.05, "samples/verified_high": share + 0.05}
        return ends | {"samples/verified": share, "samples/kl": kl, "samples/distinct": 1.0, "text/nll": 0.5}

    rows = [
        {"method": name, "seed": 0, "before": figures(0.25, 0.0), "after": figures(0.5, 2.0), "seconds": 61.4}
        for name in reversed(quickstart.FITS)
    ]
    lines = quickstart.table({"rows": rows}).splitlines()
    assert lines[2] == "| the model that ships | | 25.0 % (20–30) | 0 | 0.500 | 1.00 | |"
    assert lines[3:] == [
        f"| {name} | 0 | 25.0 → 50.0 % (45–55) | 2.0 | 0.500 | 1.00 | 61 |" for name in quickstart.FITS
    ]
