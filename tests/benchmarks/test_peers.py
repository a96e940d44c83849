"""The comparison with TRL runs, reports what it promises, and compares like with like. Its figures are not tested."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.peers")


@pytest.fixture(scope="module")
def train_file(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = map(json.loads, pairs_file.read_text(encoding="utf-8").splitlines()[:24])
    file = tmp_path_factory.mktemp("peers") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row | {"split": "train"}) + "\n" for row in rows), encoding="utf-8")
    return file


def run(out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-m", "benchmarks.peers", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


def fake_run(peer: str, speed: float, memory: float) -> dict[str, Any]:
    losses = {"first_loss": 0.5, "last_quarter_loss": 0.3}
    data = {"steps": 4, "rows": 8, "prompt_tokens": 9, "completion_tokens": 7, "data_sha256": "x"}
    return {"peer": peer, "examples_per_second": speed, "fit_seconds": 1.0, "memory_mib": memory} | losses | data


def test_quick_is_one_repeat_of_at_most_16_steps(peers: Any) -> None:
    base = ["--model", "m", "--data", "d", "--peers", "ours", "--quick"]
    options = peers.parse([*base, "--batch-size", "4"])
    assert (options.repeats, options.rows) == (1, 64)
    assert peers.parse([*base, "--rows", "5"]).rows == 5


@pytest.mark.parametrize("bad", [["--rows", "0"], ["--repeats", "0"], ["--batch-size", "-1"], ["--peers", "other"]])
def test_bad_arguments_are_named(peers: Any, capsys: pytest.CaptureFixture[str], bad: list[str]) -> None:
    with pytest.raises(SystemExit):
        peers.parse(["--model", "m", "--data", "d", "--peers", "ours", *bad])
    assert bad[0] in capsys.readouterr().err


def test_without_trl_it_says_what_to_do(
    peers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        peers.parse(["--model", "m", "--data", "d"])
    assert "--peers ours" in capsys.readouterr().err


def test_summary_takes_ratios_of_medians_and_of_pairs(peers: Any) -> None:
    figures = [(200.0, 100.0, 30.0, 60.0), (300.0, 100.0, 40.0, 50.0), (150.0, 50.0, 50.0, 40.0)]
    runs = [x for a, b, c, d in figures for x in (fake_run("ours", a, c), fake_run("trl", b, d))]
    summary = peers.summarize(runs)
    assert summary["ratios"]["ours / trl"] == {
        "speed": {"of_medians": 2.0, "per_pair": [2.0, 3.0, 3.0], "target": 1.5},
        "memory": {"of_medians": 0.8, "per_pair": [0.5, 0.8, 1.25], "target": 1.0},
    }
    assert summary["peers"]["ours"]["examples_per_second"] == {"min": 150.0, "median": 200.0, "max": 300.0}
    assert summary["same_data"]
    assert summary["starts_at_one_half"]


@pytest.mark.parametrize(("key", "value", "told"), [("data_sha256", "y", "same_data"), ("steps", 5, "same_data")])
def test_summary_tells_when_peers_saw_other_data(peers: Any, key: str, value: object, told: str) -> None:
    runs = [fake_run("ours", 1.0, 1.0), fake_run("trl", 1.0, 1.0) | {key: value}]
    assert not peers.summarize(runs)[told]


def test_ours_alone(tmp_path: Path, tiny_model: Path, train_file: Path) -> None:
    base = ["--model", str(tiny_model), "--data", str(train_file), "--batch-size", "5"]
    report, printed = run(tmp_path / "deep" / "peers.json", *base, "--quick", "--peers", "ours")
    assert report.keys() == {
        *("benchmark", "device", "versions", "git_commit", "git_changed_files", "date"),
        *("settings", "summary", "runs"),
    }
    (only,) = report["runs"]
    assert (only["peer"], only["rows"], only["steps"]) == ("ours", 24, 5)
    assert only["examples_per_second"] > 0
    assert only["memory_mib"] > 0
    assert only["first_loss"] == 0.5
    assert report["summary"]["ratios"] == {}
    assert report["settings"]["dtype"] == "float32"
    assert str(tiny_model) not in json.dumps(report)  # figures may be published, paths not
    assert "examples/s" in printed


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_ours_and_trl_train_on_the_same_tokens(tmp_path: Path, tiny_model: Path, train_file: Path) -> None:
    base = ["--model", str(tiny_model), "--data", str(train_file), "--batch-size", "5", "--quick"]
    report, printed = run(tmp_path / "peers.json", *base)
    assert [x["peer"] for x in report["runs"]] == ["ours", "trl"]
    assert report["summary"]["same_data"]
    assert report["summary"]["starts_at_one_half"]
    assert "speed, ours / trl" in printed
