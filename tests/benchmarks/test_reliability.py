"""The chaos command kills, finds what is wrong, and its table is the one of docs/reliability.md."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


@pytest.fixture
def reliability(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.reliability")


def command(tmp_path: Path, *argv: str) -> dict[str, Any]:
    """In a process of its own: it forks, which one with threads of other tests must not."""
    places = ["--out", str(tmp_path / "out.json"), "--work", str(tmp_path / "work")]
    code = [sys.executable, "-m", "benchmarks.reliability", *argv, *places]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    results: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    assert all(row["kills"] and not row["differs"] for row in results["rows"])
    return results


def test_two_runs_that_are_not_repeated(
    reliability: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = "accumulation of 2, dropout, two data workers"
    results = command(tmp_path, "--runs", "2", "--only", only)
    assert [row["case"] for row in results["rows"]] == [only] * 2
    assert {"git_commit", "versions", "device", "date", "command"} <= set(results)
    monkeypatch.setattr(reliability, "prepare", lambda work: None)
    monkeypatch.delattr(os, "fork")
    assert reliability.main(["--runs", "2", "--out", str(tmp_path / "out.json"), "--work", str(tmp_path)]) == 0
    assert reliability.table(results) in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_way_to_train(reliability: Any, tmp_path: Path) -> None:
    results = command(tmp_path, "--runs", "48", "--seed", "1")
    assert {row["case"] for row in results["rows"]} == set(reliability.CASES)


WHOLE = ["start 0", "0 0 1 aa", "0 1 2 bb", "1 0 3 aa", "1 1 4 bb"]
SEEN = {
    "undisturbed": (WHOLE, []),
    "killed after step 2, of which it goes on": ([*WHOLE[:3], "start 2", *WHOLE[3:]], []),
    "a step repeated, as no checkpoint of it was whole": ([*WHOLE[:4], "start 2", *WHOLE[3:]], []),
    "begun again": ([*WHOLE[:3], *WHOLE], []),
    "a line cut by death": ([*WHOLE[:3], "start 2", *WHOLE[3:], "1 1"], []),
    "a step doubled": ([*WHOLE[:4], "start 3", *WHOLE[3:]], ["rank 0 went from micro-batch (1, 0) to (1, 0)"]),
    "a step lost": ([*WHOLE[:3], "start 2", WHOLE[4]], ["rank 0 went from micro-batch (0, 1) to (1, 1)"]),
    "other rows": ([*WHOLE[:4], "start 2", "1 0 3 bb", WHOLE[4]], ["rank 0 saw other rows in micro-batch (1, 0)"]),
    "another order": ([*WHOLE[:4], "start 2", "1 1 3 bb"], ["rank 0 took micro-batch (1, 1) for (1, 0)"]),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_row_that_is_lost_or_doubled_is_found(name: str, reliability: Any, tmp_path: Path) -> None:
    lines, wrong = SEEN[name]
    cut = "" if lines[-1] == "1 1" else "\n"
    (tmp_path / "seen-0").write_text("\n".join(lines) + cut)
    found, told = reliability.seen(tmp_path)
    assert told == wrong
    if not wrong:
        assert found == {(0, 0, 0): "aa", (0, 0, 1): "bb", (0, 1, 0): "aa", (0, 1, 1): "bb"}


def test_accumulated_micro_batches(reliability: Any, tmp_path: Path) -> None:
    """A step is that of its last micro-batch; one that was under way is begun again."""
    lines = ["start 0", "0 0 0 aa", "start 0", "0 0 0 aa", "0 1 1 bb", "0 2 1 cc", "start 1", "0 2 1 cc", "0 3 2 dd"]
    (tmp_path / "seen-1").write_text("\n".join(lines) + "\n")
    found, wrong = reliability.seen(tmp_path)
    assert not wrong
    assert found == {(1, 0, i): x for i, x in enumerate(("aa", "bb", "cc", "dd"))}


def test_what_differs_is_told(reliability: Any) -> None:
    assert (
        reliability.difference("tensors", {"a": "1", "b": "2"}, {"a": "1", "b": "3"})
        == "tensors: ('b', '3'), not ('b', '2')"
    )
    assert reliability.difference("curves", [1, 2], [1, 2, 3]) == "curves: 3, not None"
    assert reliability.difference("step", 4, 5) == "step: 5, not 4"


def test_the_table_by_hand(reliability: Any) -> None:
    kill = {"aim": "any moment", "mid_save": False, "step": 3}
    rows = [
        {"case": "one process", "kills": [kill, {**kill, "mid_save": True}], "differs": []},
        {"case": "one process", "kills": [{**kill, "step": None}], "differs": []},
        {"case": "two data workers", "kills": [kill], "differs": ["step: 5, not 4"]},
    ]
    assert reliability.table({"rows": rows}).splitlines()[2:] == [
        "| one process | 2 | 3 | 1 | 1 | 0 |",
        "| two data workers | 1 | 1 | 0 | 0 | 1 |",
        "| all | 3 | 4 | 1 | 1 | 1 |",
    ]


def test_the_document_has_what_was_measured(reliability: Any) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "reliability.json").read_text())
    assert sorted(row["run"] for row in results["rows"]) == list(range(200))
    assert all(row["kills"] and not row["differs"] for row in results["rows"])
    assert {row["case"] for row in results["rows"]} == set(reliability.CASES)
    assert reliability.table(results) in DOCUMENT
