"""`fit --config kto.yaml`: its first steps are pinned, and what it tells and leaves is there."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import halos_pl.cli  # noqa: F401  lightning's log handlers keep the stderr of their import
from halos_pl.__main__ import main

GOLDEN = Path(__file__).parents[1] / "golden" / "quickstart.json"


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *argv: str) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["halos_pl", *argv, "--trainer.enable_progress_bar", "false"])
    return main()


@pytest.mark.parametrize("name", ["kto", "dpo", "sft"])
def test_the_first_twenty_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ["--trainer.max_steps", "20", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "0"]
    schedule = ["--model.schedule", "constant", "--model.warmup", "5"]  # whatever the number of steps
    assert run(monkeypatch, tmp_path, "fit", "--config", f"{name}.yaml", *steps, *schedule) == 0
    with (tmp_path / "runs" / name / "csv" / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    if os.environ.get("HALOS_WRITE_GOLDEN"):
        known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps(known | {name: losses}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())[name]
    assert len(losses) == 20
    assert losses == pytest.approx(golden, rel=1e-3)
    assert max(losses) - min(losses) > 0.02


def test_a_short_run_tells_and_leaves_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--trainer.max_steps", "30", "--evaluation.limit", "40", "--trainer.limit_val_batches", "1"]
    assert run(monkeypatch, tmp_path, "fit", "--config", "kto.yaml", "--name", "short", *short) == 0
    out = capsys.readouterr().out
    told = [
        "393,888 trained parameters, from nano:model",
        "samples/verified (90 %)",
        "text/nll",
        "✗",
        "runs/short/samples",
    ]
    for text in told:
        assert text in out
    folder = tmp_path / "runs" / "short"
    before, after = (read_samples(folder / "samples" / f"step={step}.jsonl") for step in (0, 30))
    assert len(before) == len(after) == 40
    assert all(x["logratio"] == 0 for x in before)
    assert any(x["logratio"] != 0 for x in after)
    with (folder / "csv" / "metrics.csv").open() as file:
        verified = [float(x) for row in csv.DictReader(file) if (x := row["val/samples/verified"])]
    assert verified == pytest.approx([sum(x["verified"] for x in part) / 40 for part in (before, after)], abs=1e-6)
    assert run(monkeypatch, tmp_path, "validate", "--config", "kto.yaml", "--model.policy", "runs/short/policy",
               "--model.reference", "nano:model", "--evaluation.limit", "40") == 0  # fmt: skip
    (again,) = re.findall(r"val/samples/verified +│ +([\d.]+)", capsys.readouterr().out)
    assert float(again) == pytest.approx(verified[1], abs=1e-6)


def read_samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--data.train", "mine.jsonl"], "data.train is your own, but data.validation is the demo's"),
        (["--evaluation.prompts", "mine.jsonl"], "evaluation.prompts is your own"),
        (["--data.validation", "null"], "evaluation runs at every validation, which needs held-out rows"),
        (["--evaluation.prompts", "nano:prompt"], "did you mean nano:prompts"),
        (["--evaluation.verifier", "halos_pl.nano.grantd"], "evaluation.verifier"),
        (["--evaluation.max_new_tokens", "500"], "the longest prompt has"),
        (["--evaluation.temperature", "-1"], "temperature must be at least 0"),
        (["--model.policy", "nano:modell"], "did you mean nano:model"),
    ],
)
def test_mistakes_are_told_before_anything_begins(
    argv: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "fit", "--config", "kto.yaml", *argv) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_commands_that_sample_nothing_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--data.test", "nano:thumbs-held-out", "--trainer.limit_test_batches", "1"]
    assert run(monkeypatch, tmp_path, "test", "--config", "kto.yaml", *few) == 0
    assert "`test` samples nothing: evaluation belongs to fit and validate" in capsys.readouterr().out


def test_a_run_that_goes_on_remembers_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--config", "kto.yaml", "--name", "on", "--evaluation.limit", "8", "--evaluation.text", "null"]
    short += ["--trainer.limit_val_batches", "1", "--trainer.limit_train_batches", "4", "--model.schedule", "constant"]
    assert run(monkeypatch, tmp_path, "fit", *short, "--trainer.max_epochs", "1") == 0
    first = capsys.readouterr().out
    assert run(monkeypatch, tmp_path, "fit", *short, "--trainer.max_epochs", "2", "--ckpt_path", "last") == 0
    second = capsys.readouterr().out
    for name in ("samples/verified (90 %)", "samples/kl", "loss", "rewards/margin"):
        (before, _), (again, _) = (
            re.findall(rf"│ {re.escape(name)} +│([^│]+)│([^│]+)│", out)[0] for out in (first, second)
        )
        assert again == before
    assert (tmp_path / "runs" / "on" / "samples" / "step=8.jsonl").exists()


def test_a_verifier_that_fails_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["--evaluation.prompts", "nano:thumbs-held-out", "--evaluation.limit", "2"]  # rows without a name
    assert run(monkeypatch, tmp_path, "fit", "--config", "kto.yaml", *prompts) == 2
    assert re.search(
        r"evaluation.verifier fails on .*thumbs-held-out.jsonl:1: KeyError: 'name'", capsys.readouterr().err
    )
    assert not (tmp_path / "runs").exists()
