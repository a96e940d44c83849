"""The command behind the README's tables of objectives, with a few steps a run."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from halos_pl.config_files import shipped_configs
from halos_pl.evaluate.interval import clopper_pearson
from halos_pl.losses import OBJECTIVES

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--fit", "--trainer.max_steps", "4", "--evaluation.limit", "8", "--trainer.limit_val_batches", "1"]


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.suite")


def test_two_short_runs_that_are_not_repeated(suite: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, work = tmp_path / "suite.json", tmp_path / "runs"
    argv = ["--out", str(out), "--seeds", "1", "--jobs", "2", "--work", str(work), "--only", "KTO", "CSFT", *SHORT]
    assert suite.main(argv) == 0
    results = json.loads(out.read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert set(rows) == {"KTO", "CSFT"}
    assert rows["CSFT"]["after"]["kl"] != 0, "policy after the good token against the reference without"
    folder = work / f"{list(suite.METHODS).index('KTO')}-1"
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        logged = [float(x["val/samples/kl"]) for x in csv.DictReader(file) if x["val/samples/kl"]]
    assert rows["KTO"]["after"]["kl"] == pytest.approx(logged[-1], rel=1e-4) != 0
    printed = capsys.readouterr().out
    assert suite.table(results, ["KTO", "CSFT"]) in printed
    assert suite.main(argv) == 0
    assert json.loads(out.read_text()) == results


def test_the_table_by_hand(suite: Any) -> None:
    def row(method: str, seed: int, share: float) -> dict[str, Any]:
        after = {"samples/verified": share, "kl": 2.0 * seed, "text/nll": 0.5 + seed, "samples/distinct": 1.0}
        return {"method": method, "seed": seed, "after": after, "seconds": 30.0 + seed}

    lines = suite.table({"rows": [row("DPO", 0, 0.5), row("KTO", 1, 0.75), row("KTO", 0, 0.25)]}, ["KTO", "DPO", "IPO"])
    low, high = (100 * x for x in clopper_pearson(400, 800))
    assert lines.splitlines()[2] == f"| KTO | 25.0 · 75.0 | 50.0 % ({low:.0f}–{high:.0f}) | 1.0 | 1.000 | 1.00 | 30 |"
    assert lines.splitlines()[3].startswith("| DPO | 50.0 | 50.0 % (")
    assert len(lines.splitlines()) == 4, "what was not run has no line"


def test_every_objective_is_in_it_with_a_config_of_its_own(suite: Any) -> None:
    configs = {argv[1] for argv in suite.OBJECTIVES.values()}
    named = {
        path.read_text(encoding="utf-8").split("class_path: ")[1].split()[0]: path.name
        for path in shipped_configs().glob("*.yaml")
        if path.name != "blimp.yaml"
    }
    assert set(named) == {x.__name__ for x in OBJECTIVES}
    assert configs == set(named.values()) - {"sft.yaml"}, "sft.yaml makes the model that the others start from"


def test_the_readme_has_the_tables_that_were_measured(suite: Any) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = suite.load(ROOT / "benchmarks" / "results" / "suite.json")
    for methods in suite.SETS.values():
        assert {(row["method"], row["seed"]) for row in results["rows"]} >= {(m, s) for m in methods for s in range(3)}
        assert suite.table(results, list(methods)) in readme
