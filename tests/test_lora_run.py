"""Adapters from the command line: what a run trains, tells, leaves and refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import halos_pl.cli  # noqa: F401  lightning's log handlers keep the stderr of their import: not one that a test captured
from halos_pl.__main__ import main
from halos_pl.checkpoints import open_checkpoint
from halos_pl.data import AlignmentData
from halos_pl.losses import KTO
from halos_pl.models import LoRA, ModelError
from halos_pl.module import AlignmentModule
from halos_pl.parser_errors import LORA_KEYS

Command = Callable[..., int]
IDS = torch.arange(3, 51).reshape(3, 16)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, pairs_file: Path) -> Command:
    """Runs a command on the tiny model, in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    common = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]

    def command(name: str, *argv: str) -> int:
        words = ["--config", "recipes/kto-lora.yaml", "--model.policy", str(tiny_model), *common]
        if name == "fit":
            words += ["--data.train", str(pairs_file), "--trainer.max_steps", "4", "--trainer.log_every_n_steps", "2"]
        monkeypatch.setattr(sys, "argv", ["halos_pl", name, *words, *argv])
        try:
            return main()
        except SystemExit as end:  # --print_config
            return int(end.code or 0)

    return command


def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model.eval()(IDS, use_cache=False).logits
    return out


def test_a_run_leaves_the_merged_policy_and_the_adapter(
    command: Command, tmp_path: Path, tiny_model: Path, pairs_file: Path, capsys: Any
) -> None:
    held_out = ("--data.validation", str(pairs_file))
    assert command("fit", *held_out, "--model.lora.r", "2", "--model.optimizer.lr", "1e-2", "--name", "mine") == 0
    out = capsys.readouterr().out
    assert "GPT2LMHeadModel, 2,048 trained parameters" in out
    assert "adapters: 5.13 % of all parameters are trained, LoRA(r=2, alpha=4)" in out
    assert "reference: the policy with its adapters off" in out
    assert "runs/mine/adapter  (peft.PeftModel.from_pretrained)" in out
    folder = tmp_path / "runs" / "mine"
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    assert type(policy) is type(base)
    assert policy.state_dict().keys() == base.state_dict().keys()
    assert (logits(policy) - logits(base)).abs().max() > 1e-2
    under_peft = peft.PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(logits(policy), logits(under_peft), atol=1e-4, rtol=0)
    stored = open_checkpoint(folder / "checkpoints" / "last.ckpt").load()["state_dict"]
    for key, value in load_file(folder / "adapter" / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(value, stored[f"policy.lm.{name}.default.weight"])
    assert not [key for key in stored if key.startswith("reference.")]
    card = (folder / "policy" / "README.md").read_text()
    assert "- trained by adapters: `LoRA(r=2, alpha=4)`" in card
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["lora"]["r"] == 2

    capsys.readouterr()  # the exported policy against its start, as a model of full weights
    words = ("--data.test", str(pairs_file), "--name", "mine", "--model.policy", str(folder / "policy"))
    assert command("predict", *words, "--model.lora", "null", "--model.reference", str(tiny_model)) == 0
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert max(abs(row["logratio"]) for row in rows) > 1e-3

    assert (
        command("validate", *held_out, "--model.lora.r", "2", "--ckpt_path", str(folder / "checkpoints/last.ckpt")) == 0
    )
    told = capsys.readouterr().out
    assert "the reference is the policy itself" not in told
    assert "val/kl" in told


def test_going_on_with_the_adapter_of_a_run(
    command: Command, tmp_path: Path, tiny_model: Path, pairs_file: Path, capsys: Any
) -> None:
    assert command("fit", "--name", "first", "--model.lora.r", "2", "--model.optimizer.lr", "1e-2") == 0
    assert command("fit", "--name", "first", "--model.lora.r", "3", "--ckpt_path", "last") == 2
    assert "lora was LoRA(r=2, alpha=4), now LoRA(r=3, alpha=6)" in capsys.readouterr().err
    recipe = ("--config", "recipes/kto.yaml", "--data.validation", str(pairs_file), "--model.optimizer.lr", "1e-2")
    adapter = ("--model.lora", "null", "--model.lora.adapter", "runs/first/adapter")
    assert command("fit", "--name", "second", *recipe, *adapter) == 0
    told = capsys.readouterr().out
    assert "reference: the policy with the adapter that it began with" in told
    losses = [line for line in told.splitlines() if line.startswith("│ loss")]
    assert "│    0.5 │" in losses[0], "policy == reference at the start"
    card = (tmp_path / "runs" / "second" / "policy" / "README.md").read_text()
    assert f"- reference: `{tiny_model} with the adapter runs/first/adapter`" in card
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "runs" / "second" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "second" / "policy")
    torch.testing.assert_close(logits(merged), logits(again), atol=1e-4, rtol=0)
    config = tmp_path / "runs" / "first" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "org/another"}))
    capsys.readouterr()
    assert command("fit", "--name", "third", *recipe, *adapter) == 2
    assert "runs/first/adapter was made for the base 'org/another', and the policy is" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "third").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--model.lora.rr 2", "unknown key --model.lora.rr; did you mean 'model.lora.r'?"),
        ("--model.lora.r two", "--model.lora.r: got 'two', expected int or null"),
        ("--model.lora.r 0", "--model.lora.r must be at least 1, got 0"),
        ("--model.lora 16", f"--model.lora: got '16'; it takes {', '.join(LORA_KEYS)}, as in --model.lora.r 16"),
        ("--model.lora.quantize 3bit", "--model.lora.quantize: got '3bit'; did you mean '8bit'?; it takes none, 4bit"),
        ("--model.lora.adapter nowhere", "--model.lora.adapter brings its own r: leave --model.lora.r out"),
        ("--model.lora.target_modules [lm_head]", "no adapter on the output head 'lm_head'"),
        ("--model.lora.target_modules [c_atn]", "has no linear layer 'c_atn'; did you mean 'c_attn'?"),
    ],
)
def test_mistakes_are_told_in_one_line(words: str, says: str, command: Command, tmp_path: Path, capsys: Any) -> None:
    assert command("fit", *words.split()) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(told) == 1
    assert says in told[0]
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_its_keys_are_those_that_the_parser_names() -> None:
    assert set(LoRA.__dataclass_fields__) == set(LORA_KEYS)


def test_the_parser_takes_it_in_every_form(command: Command, tmp_path: Path, capsys: Any) -> None:
    for words in (
        ["--model.lora.target_modules", "[c_attn, c_fc]"],
        ["--model.lora", "{target_modules: [c_attn, c_fc]}"],
    ):
        assert command("fit", *words, "--print_config") == 0
        assert yaml.safe_load(capsys.readouterr().out)["model"]["lora"]["target_modules"] == ["c_attn", "c_fc"]
    (tmp_path / "mine.yaml").write_text("model: {lora: {r: 3, alpha: 1.5}}")
    assert command("fit", "--config", "mine.yaml", "--print_config") == 0
    lora = yaml.safe_load(capsys.readouterr().out)["model"]["lora"]
    assert (lora["r"], lora["alpha"]) == (3, 1.5)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", "float32"), ("bf16-mixed", "float32"), ("32-true", "bfloat16")]
)
def test_a_step_moves_the_adapters_alone(
    precision: str, dtype: Any, command: Command, tiny_model: Path, pairs_file: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Also where autocast keeps what the passes without gradient have cast."""
    import lightning as L

    module = AlignmentModule(
        KTO(),
        policy=str(tiny_model),
        dtype=dtype,
        lora=LoRA(r=2),
        gradient_checkpointing=True,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0),
    )
    data = AlignmentData(train=str(pairs_file), batch_size=8)
    module.configure_model()
    assert module.policy is not None
    before = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_steps=3, accelerator="cpu", precision=precision, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, datamodule=data)
    moved = {name for name, p in module.policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == len(moved)
    assert not [x for x in recwarn if "lose updates" in str(x.message)]


def test_without_peft_there_is_one_error(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setattr("halos_pl.models.lora.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs peft: pip install"):
        AlignmentModule(policy=str(tiny_model), lora=LoRA())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_grammar_is_learnt_by_adapters(command: Command, tmp_path: Path, shared_data: Path) -> None:
    """KTO on BLiMP, rank 2 in every linear layer; 62.3 % before. Minutes a run."""
    accuracies = []
    pairs = str(shared_data / "paired" / "blimp_prefix.jsonl")
    words = ["--config", "blimp.yaml", "--model.policy", str(shared_data / "models" / "stories260K")]
    words += ["--data.validation", pairs, "--data.train", pairs, "--model.lora.r", "2", "--model.optimizer.lr", "5e-3"]
    for seed in ("0", "1"):
        name = f"blimp-{seed}"
        options = ("--trainer.max_steps", "-1", "--seed_everything", seed)
        assert command("fit", *words, *options, "--name", name) == 0
        rows = (tmp_path / "runs" / name / "csv" / "metrics.csv").read_text().splitlines()
        place = rows[0].split(",").index("val/pair_accuracy")
        accuracies.append(float([row.split(",")[place] for row in rows[1:] if row.split(",")[place]][-1]))
    print(accuracies)
    assert sum(accuracies) / 2 >= 0.88
