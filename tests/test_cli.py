"""The command line, end to end on a tiny model: what a run leaves, and what a mistake is told.

The file is long because one fixture, a whole run on a tiny model, serves every command.
"""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import halos_pl.cli  # noqa: F401  lightning's log handlers keep the stderr of their import: not one that a test captured
from halos_pl import __version__
from halos_pl.__main__ import COMMANDS, main
from halos_pl.checkpoints import open_checkpoint

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["halos_pl", *argv])
        try:
            return main()
        except SystemExit as end:  # --print_config
            return int(end.code or 0)

    return run


@pytest.fixture
def fit(run: Run, tiny_model: Path, pairs_file: Path) -> Run:
    """`fit` on the tiny model and pairs, four steps, with whatever a test adds."""
    options = {
        "config": "recipes/kto.yaml",
        "model.policy": tiny_model,
        "data.train": pairs_file,
        "model.optimizer.lr": 1e-3,
        "trainer.max_steps": 4,
        "trainer.log_every_n_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }

    def fit(*argv: str, command: str = "fit", **changed: Any) -> int:
        merged = options | {key.replace("__", "."): value for key, value in changed.items()}
        words = [word for key, value in merged.items() if value is not None for word in (f"--{key}", str(value))]
        return run(command, *words, *argv)

    return fit


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_fit_leaves_a_run_folder(fit: Run, pairs_file: Path, tiny_model: Path, tmp_path: Path, capsys: Any) -> None:
    assert fit(data__validation=pairs_file) == 0
    folder = tmp_path / "runs" / "kto"
    assert {x.name for x in folder.iterdir()} == {
        *("checkpoints", "config.yaml", "csv", "environment.json", "policy", "tensorboard")
    }
    links = {x.name: x.readlink().name for x in (folder / "checkpoints").iterdir() if x.is_symlink()}
    assert links == {"last.ckpt": "step=4.ckpt", "best.ckpt": "step=4.ckpt"}

    out = capsys.readouterr().out
    assert "train: 192 examples, 96 of them desirable; 0 of 192 rows were truncated" in out
    assert "pair_accuracy" in out
    assert "runs/kto/policy" in out

    with (folder / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [1, 3], "steps 2 and 4, counted from 0"
    held_out = [row for row in rows if row["val/loss"]]
    assert len(held_out) == 2, "before and after"
    assert float(held_out[0]["val/loss"]) == 0.5
    for column in ("kl", "kl_raw", "rewards/margin", "grad_norm", "lr", "tokens_per_second", "completion_tokens"):
        assert math.isfinite(float(next(row for row in rows if row["train/loss"])[f"train/{column}"]))

    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["model"]["policy"] == str(tiny_model)
    assert resolved["model"]["objective"]["init_args"]["beta"] == 0.1


def test_the_exported_policy_is_the_trained_one(fit: Run, tmp_path: Path, tiny_model: Path, pairs_file: Path) -> None:
    assert fit("--data.eos_token", "<unk>", "--data.chat_template", "chatml", data__validation=pairs_file) == 0
    folder = tmp_path / "runs" / "kto"
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    state = open_checkpoint(folder / "checkpoints" / "last.ckpt").load()["state_dict"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[f"policy.lm.{name}"]), name
    start = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in model.state_dict().items())

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    assert tokenizer.eos_token == "<unk>"
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    card = (folder / "policy" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["halos-pl", "kto"]
    for part in ("KTO(beta=0.1", str(pairs_file), "192 examples", "| val/pair_accuracy |"):
        assert part in card


def test_the_saved_config_repeats_the_run(fit: Run, run: Run, tmp_path: Path, pairs_file: Path) -> None:
    assert fit(data__validation=pairs_file) == 0
    assert run("fit", "--config", "runs/kto/config.yaml", "--name", "again") == 0
    first, again = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / name / "policy").state_dict()
        for name in ("kto", "again")
    )
    assert all(torch.equal(value, again[key]) for key, value in first.items())


def test_runs_never_overwrite_each_other(fit: Run, tmp_path: Path, capsys: Any) -> None:
    assert fit() == 0
    assert fit() == 0
    assert {x.name for x in (tmp_path / "runs").iterdir()} == {"kto", "kto-2"}
    before = (tmp_path / "runs" / "kto" / "config.yaml").stat().st_mtime_ns
    assert fit("--name", "kto") == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert (tmp_path / "runs" / "kto" / "config.yaml").stat().st_mtime_ns == before


def test_going_on_from_the_last_checkpoint(fit: Run, tmp_path: Path) -> None:
    """At the end of an epoch; exact to the bit, since order and y′ are functions of (seed, epoch)."""
    common = {"trainer__max_steps": -1, "data__batch_size": 32, "model__schedule": "constant", "model__warmup": 0}
    assert fit("--name", "whole", trainer__max_epochs=2, **common) == 0
    assert fit("--name", "parts", trainer__max_epochs=1, **common) == 0
    assert fit("--name", "parts", "--ckpt_path", "last", trainer__max_epochs=2, **common) == 0
    whole, parts = (
        open_checkpoint(tmp_path / "runs" / name / "checkpoints" / "last.ckpt").load() for name in ("whole", "parts")
    )
    assert parts["global_step"] == whole["global_step"] == 12
    assert all(torch.equal(value, parts["state_dict"][key]) for key, value in whole["state_dict"].items())
    assert yaml.safe_load((tmp_path / "runs" / "parts" / "config.yaml").read_text())["ckpt_path"] is None


def test_going_on_with_a_run_that_has_ended_changes_nothing(fit: Run, tmp_path: Path, capsys: Any) -> None:
    common = {"trainer__max_steps": -1, "data__batch_size": 64, "trainer__max_epochs": 1}
    assert fit("--name", "mine", **common) == 0
    card = tmp_path / "runs" / "mine" / "policy" / "README.md"
    card.write_text("mine")
    assert fit("--name", "mine", "--ckpt_path", "last", **common) == 0
    assert "this run had ended at step 3: raise --trainer.max_epochs" in capsys.readouterr().out
    assert card.read_text() == "mine"


def test_a_random_model_from_a_configuration(fit: Run, tmp_path: Path, tiny_model: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 260, "hidden_size": 16, "intermediate_size": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}
    options = {"model__policy": None, "model__tokenizer": tiny_model, "config": "recipes/sft.yaml"}
    assert fit(model__config=json.dumps(config), **options) == 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fit(model__config=tmp_path / "config.json", **options) == 0
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / name / "policy").state_dict()
        for name in ("sft", "sft-2")
    )
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    saved = json.loads((tmp_path / "runs" / "sft" / "policy" / "config.json").read_text())
    assert (saved["bos_token_id"], saved["eos_token_id"]) == (1, 2), "the tokenizer's, not Llama's"


def test_several_configs_and_overrides(fit: Run, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.yaml").write_text("model:\n  objective:\n    init_args:\n      beta: 0.7\n")
    assert fit("--config", "mine.yaml", "--model.objective.desirable_weight", "1.2", "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["objective"]["init_args"]["beta"] == 0.7
    assert printed["model"]["objective"]["init_args"]["desirable_weight"] == 1.2
    assert fit("--model.objective", "DPO", "--model.objective.beta", "0.4", "--print_config") == 0
    objective = yaml.safe_load(capsys.readouterr().out)["model"]["objective"]
    assert objective == {"class_path": "halos_pl.losses.DPO", "init_args": {"beta": 0.4, "humanline": None}}
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------- other commands


def test_validate_and_test(fit: Run, pairs_file: Path, tmp_path: Path, capsys: Any) -> None:
    assert fit(command="validate", data__validation=pairs_file, data__train=None) == 0
    assert "val/pair_accuracy" in capsys.readouterr().out
    assert fit(command="test", data__test=pairs_file, data__train=None) == 0
    assert "test/pair_accuracy" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_validate_finds_the_checkpoint_of_a_run(fit: Run, pairs_file: Path, capsys: Any) -> None:
    """Lightning would warn, and measure the untrained policy."""
    assert fit("--name", "mine", data__validation=pairs_file, model__optimizer__lr=1e-2) == 0
    trained = re.search(r"loss .*│ +(\S+) │\n", capsys.readouterr().out)
    assert fit("--name", "mine", "--ckpt_path", "last", command="validate", data__validation=pairs_file) == 0
    measured = re.search(r"val/loss .*│ +(\S+) +│\n", capsys.readouterr().out)
    assert trained is not None
    assert measured is not None
    assert float(measured[1]) == pytest.approx(float(trained[1]), abs=1e-3)
    assert abs(float(measured[1]) - 0.5) > 1e-3


def test_predict_writes_scores_in_the_order_of_the_data(
    fit: Run, pairs_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    assert fit(command="predict", data__test=pairs_file, data__train=None, data__eval_batch_size=7) == 0
    lines = (tmp_path / "runs" / "kto" / "predictions.jsonl").read_text().splitlines()
    scores = [json.loads(line) for line in lines]
    assert [(x["row"], x["desirable"]) for x in scores] == [(i, flag) for i in range(1, 97) for flag in (True, False)]
    assert all(x["logratio"] == x["reward"] == 0 for x in scores)

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    for k in (0, 1, 100, 191):
        row = rows[scores[k]["row"] - 1]
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["chosen" if scores[k]["desirable"] else "rejected"])["input_ids"], 2]
        ids = torch.tensor([prompt + completion])
        logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logps.gather(1, ids[0, len(prompt) :, None]).sum()
        assert scores[k]["logp"] == pytest.approx(expected.item(), abs=1e-3)
        assert scores[k]["length"] == len(completion)


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "kt.yaml"], r"no file 'kt.yaml'.*did you mean 'kto.yaml'"),
        (["--model.objective.bta", "0.3"], "unknown key 'bta'; did you mean --model.objective.beta"),
        (["--model.objectiv.beta", "0.3"], "unknown key --model.objectiv.beta; did you mean 'model.objective.beta'"),
        (["--data.trian", "x"], "unknown key --data.trian; did you mean 'data.train'"),
        (["--trainer.max_epoch", "3"], "unknown key --trainer.max_epoch; did you mean 'trainer.max_epochs'"),
        (["--data.batch_size", "eight"], "--data.batch_size: got 'eight', expected int"),
        (["--data.sampler", "shufle"], "--data.sampler: got 'shufle'; did you mean 'shuffle'"),
        (["--model.objective", "KTOO"], "--model.objective: no class 'KTOO' there; did you mean 'KTO'"),
        (["--model.objective.beta", "-1"], "beta must be a finite number > 0, got -1.0"),
        (["--model.optimizer", "AdamV"], "--model.optimizer: no class 'AdamV' there; did you mean 'Adam'"),
        (["--model.warmup", "-1"], "warmup must be a share"),
        (["--model.policy", "nowhere/model/here"], "no model folder 'nowhere/model/here'"),
        (["--model.config", "x.json"], "exactly one of"),
        (["--data.train", "nowhere.jsonl"], "data.train: 'nowhere.jsonl': no such file"),
        (["--data.eos_token", "<eos>"], "eos_token '<eos>' is not one token"),
        (["--data.max_length", "1"], "max_length is 1"),
        (["--name", "../mine"], "expected the name of a folder"),
        (["--trainer.default_root_dir", "x"], "runs go to the folder of --runs"),
        (["--trainer.accelerator", "gpu"], "No supported gpu backend found"),
        (["--model.warmup", "100"], "100 steps of warm-up, but the run has 4"),
        (["--model.optimizer.lr", "-1"], "Invalid learning rate"),
        (["--seed_everything", "true"], "--seed_everything"),
        (["--trainer.precision", "bf16-mixed", "--model.dtype", "float64"], "mixes with float32 weights"),
        (["--data.chat_template", "tulu"], "unknown chat template 'tulu'.*did you mean 'tulu2'"),
        (["--trainer.precision", "bf16-true"], "set --model.dtype bfloat16"),
        (["--model.objective", "DPO", "--model.reference", "none"], "DPO compares policy and reference"),
        (["--ckpt_path", "last"], "--ckpt_path last: of which run"),
        (["--ckpt_path", "last", "--name", "new"], "--ckpt_path last: runs/new holds no such checkpoint"),
        (["--ckpt_path", "nowhere.ckpt"], "--ckpt_path: no checkpoint 'nowhere.ckpt'"),
    ],
)
def test_mistakes_are_told_in_one_message(
    argv: list[str], message: str, fit: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.perf_counter()
    assert fit(*argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("halos_pl: error: ")
    assert "Traceback" not in err
    assert re.search(message, err), err
    assert time.perf_counter() - start < 10
    assert not (tmp_path / "runs").exists(), "nothing is half-written"


def test_an_unknown_key_in_a_config(fit: Run, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.yaml").write_text("data:\n  bach_size: 3\n")
    assert fit("--config", "mine.yaml") == 2
    assert "unknown key --data.bach_size; did you mean 'data.batch_size'?" in capsys.readouterr().err


def test_a_model_that_cannot_be_scored_leaves_no_folder(
    fit: Run, tiny_model: Path, tmp_path: Path, capsys: Any
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").unlink()
    assert fit(model__policy=broken) == 2
    assert "broken" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "kto").exists()


# ------------------------------------------------------------------------------------------------- a real process


def process(*argv: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "halos_pl", *argv], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    return done, time.perf_counter() - start


@pytest.mark.parametrize("argv", [["--help"], ["--version"], []])
def test_help_and_version_answer_at_once(argv: list[str], tmp_path: Path) -> None:
    done, seconds = process(*argv, cwd=tmp_path)
    assert done.returncode == 0
    assert __version__ in done.stdout
    assert seconds < 1, "importing torch or lightning for a help text?"


def test_the_static_help_names_every_command(tmp_path: Path) -> None:
    done, _ = process("--help", cwd=tmp_path)
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)
    wrong, _ = process("fitt", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean 'fit'?" in wrong.stderr


def test_a_mistake_in_a_real_process(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    done, seconds = process(
        *("fit", "--config", "kto.yaml", "--model.policy", str(tiny_model), "--data.train", str(pairs_file)),
        *("--model.objective.betta", "1"),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("halos_pl: error: unknown key 'betta'")
    assert seconds < 30
    assert not list(tmp_path.iterdir())
