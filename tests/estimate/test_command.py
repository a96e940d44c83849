"""`python -m halos_pl estimate`: what it prints, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halos_pl.__main__ import main
from halos_pl.estimate import Plan, communication, memory, read_shapes
from halos_pl.models import ModelSource


@pytest.fixture
def model(config: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["estimate", *words])
    out, err = capsys.readouterr()
    return status, out, err


def found(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    status, out, err = run(capsys, *words, "--json")
    assert status == 0, err
    values: dict[str, Any] = json.loads(out)
    return values


def test_a_fit_command_is_taken_as_it_stands(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "fit",
        "--config",
        "recipes/kto.yaml",
        "--name",
        "mine",
        "--model.config",
        model,
        "--data.train",
        "x.jsonl",
    ]
    words += [
        "--model.tokenizer",
        "TOKENIZER",
        "--data.batch_size",
        "2",
        "--data.max_length",
        "3",
        "--trainer.devices",
        "2",
    ]
    got = found(
        capsys, *words, "--evaluation.prompts", "y.jsonl", "--model.objective.beta", "0.3", "--seed_everything", "1"
    )
    shapes = read_shapes(ModelSource(config=model))
    plan = Plan(rows=2, length=3, gpus=2, shard=2, strategy="fsdp")
    assert got["memory"]["total"] == memory(shapes, plan).total
    assert got["communication"]["sent"] == communication(shapes, plan).sent
    assert got["plan"]["passes"] == plan.passes


def test_what_it_prints(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--model.config", model, "--gpus", "64", "--shard", "8")
    assert status == 0
    assert "1,160 parameters" in out
    assert "FSDP2 on 64 GPUs, 8 × 8" in out
    for line in ("weights", "optimizer state", "reference", "total", "all-gathers, policy y′ forward", "bound by"):
        assert line in out
    assert "fits into 72.0 GiB" in out


def test_exit_status_says_whether_it_fits(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--model.config", model, "--memory", "0.00001")
    assert status == 1
    assert "does not fit" in out
    assert "largest --data.batch_size: none" in out


@pytest.mark.parametrize(
    ("words", "plan"),
    [
        (["--model.objective", "DPO"], {"rows": 16, "mismatched": False}),
        (["--model.objective", "SFT"], {"reference": "none", "mismatched": False}),
        (["--model.reference", "none"], {"reference": "none", "mismatched": True}),
        (["--model.lora.r", "4"], {"reference": "adapter"}),
        (["--model.lora.r", "4"], {"lora": {"r": 4, "targets": None}}),
        (["--model.lora.r", "4", "--model.lora.target_modules", "[q_proj]"], {"lora": {"r": 4, "targets": ["q_proj"]}}),
        (["--model.lora.r", "4", "--reference", "resident"], {"reference": "resident"}),
        (["--gpus", "2", "--offload_reference", "true"], {"reference": "offloaded"}),
        (["--gpus", "2", "--reference_dtype", "bfloat16"], {"reference_bytes": 2, "compute": "bfloat16"}),
        ([], {"strategy": "single", "compute": "autocast", "weight_bytes": 4}),
        (["--trainer.precision", "32-true"], {"compute": "float32"}),
        (["--model.dtype", "bfloat16"], {"compute": "bfloat16", "weight_bytes": 2, "reference_bytes": 2}),
        (["--trainer.strategy", "ddp", "--gpus", "4"], {"strategy": "ddp", "shard": 1}),
        (["--trainer.devices", "4", "--trainer.num_nodes", "2"], {"gpus": 8, "shard": 8}),
        (["--model.optimizer", "RMSprop"], {"optimizer_states": 1}),
        (["--model.optimizer", "SGD", "--model.optimizer.momentum", "0.9"], {"optimizer_states": 1}),
        (["--trainer.accumulate_grad_batches", "4"], {"accumulate": 4}),
        (["--data.max_length", "4096"], {"length": 2048}),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_words_of_fit(words: list[str], plan: dict[str, Any], model: str, capsys: pytest.CaptureFixture[str]) -> None:
    got = found(capsys, "--model.config", model, *words)["plan"]
    assert {name: got[name] for name in plan} == plan


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data.batchsize", "4"], "unknown key --data.batchsize; did you mean 'data.batch_size'"),
        (["--model.objective", "KTOO"], "no class 'KTOO'"),
        (["--gpus", "8", "--shard", "3"], "--shard 3 does not divide the 8 GPUs"),
        (["--shard", "2", "--gpus", "2", "--trainer.strategy", "ddp"], "needs --trainer.strategy fsdp"),
        (["--reference", "adapter"], "--reference adapter switches adapters off: it needs --model.lora.r"),
        (["--model.objective", "SFT", "--reference", "cached"], "SFT loads no reference here"),
        (["--model.objective", "DPO", "--model.reference", "none"], "no reference-free form"),
        (["--offload_reference", "true", "--reference", "cached"], "one or the other"),
        (["--data.batch_size", "0"], "must be at least 1"),
        (["--trainer.precision", "16-mixed"], "--trainer.precision 16-mixed is not estimated"),
        (["--trainer.strategy", "deepspeed"], "--trainer.strategy deepspeed is not estimated"),
        (["--model.dtype", "float64"], "float64 is for tests"),
        (["--mfu", "40"], "mfu is a share of the peak"),
        (["--reserve", "1"], "--reserve is a share"),
        (["--gpus", "0"], "--gpus"),
        (["--config", "kt.yaml"], "no file 'kt.yaml' here"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes(words: list[str], told: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "--model.config", model, *words)
    assert (status, out) == (2, "")
    assert err.startswith("halos_pl: error: ")
    assert told in err


def test_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "name the policy with exactly one of" in run(capsys)[2]
    assert "no model folder './nowhere'" in run(capsys, "--model.policy", "./nowhere")[2]
    assert run(capsys, "--model.policy", "nano:model")[0] == 0
