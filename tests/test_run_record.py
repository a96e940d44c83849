"""What a run ran with, start by start, and no secret among it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halos_pl import __version__
from halos_pl.run_record import append, git, redact, start, variables


def test_a_start_says_with_what_and_on_what(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["halos_pl", "fit", "--wandb.api_key", "abcdef"])
    monkeypatch.chdir(tmp_path)
    found = start()
    assert found["versions"]["halos_pl"] == __version__
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "lightning", "transformers"} <= found["versions"].keys()
    assert found["command"][1:] == ["halos_pl", "fit", "--wandb.api_key", "…"]
    assert found["git"]["working folder"] is None
    assert found["folder"] == str(tmp_path)
    json.dumps(found)


def test_a_run_that_goes_on_adds_to_the_list(tmp_path: Path) -> None:
    file = tmp_path / "run" / "environment.json"
    append(file, {"time": 1})
    append(file, {"time": 2})
    assert json.loads(file.read_text()) == {"starts": [{"time": 1}, {"time": 2}]}
    file.write_text("half a li")
    append(file, {"time": 3})
    assert json.loads(file.read_text()) == {"starts": [{"time": 3}]}
    assert {x.name for x in file.parent.iterdir()} == {"environment.json", "environment.json.unreadable"}


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("--hub.token abc", "--hub.token …"),
        ("--hf_token=abc", "--hf_token=…"),
        ("--wandb.api_key abc --x 1", "--wandb.api_key … --x 1"),
        ("--password --x 1", "--password --x 1"),
        ("--access-key abc", "--access-key …"),
        ("--data.max_tokens 8", "--data.max_tokens 8"),
        ("--model.tokenizer folder", "--model.tokenizer folder"),
        ("--data.special_tokens allow", "--data.special_tokens allow"),
        ("--data.eos_token </s>", "--data.eos_token </s>"),
        ("--model.policy hf_abcdefghijklmnop", "--model.policy …"),
        ("--data.train https://me:pass@host/x", "--data.train https://…@host/x"),
    ],
)
def test_secrets_of_the_command_line(command: str, shown: str) -> None:
    assert redact(command.split()) == shown.split()


def test_only_listed_variables_are_kept() -> None:
    environment = {
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "7",
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "hf_abcdefghijklmnop",
        "AWS_SECRET_ACCESS_KEY": "abc",
        "HALOS_API_KEY": "abc",
        "HOME": "/home/me",
    }
    kept = {"HALOS_API_KEY": "…", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"}
    assert variables(environment) == kept


def test_commit_and_changes(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert git(tmp_path) is None
    run("init")
    assert git(tmp_path) is None, "no commit yet"
    (tmp_path / "a").write_text("1")
    run("add", "a")
    run("commit", "-m", "a")
    assert git(tmp_path) == {"commit": run("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "b").touch()
    assert git(tmp_path) == {"commit": run("rev-parse", "HEAD"), "changed": False}, "untracked files do not count"
    assert git(tmp_path, of="b") is None, "no file of this checkout"
    (tmp_path / "a").write_text("2")
    found = git(tmp_path)
    assert found is not None
    assert found["changed"]
