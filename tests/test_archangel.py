"""The paper's setting: every file of configs/archangel runs on the architectures that it was made for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, GPTNeoXConfig, LlamaConfig, MistralConfig

from halos_pl.__main__ import main
from halos_pl.cli import HalosCLI
from halos_pl.config_files import shipped_configs
from halos_pl.data.templates import TEMPLATES
from halos_pl.losses import CDPO, CSFT, DPO, KTO, ORPO, SFT, Objective, PPOOffline, SLiC
from halos_pl.models import ModelSource, load_model

FOLDER = shipped_configs() / "archangel"
OBJECTIVES: dict[str, Objective] = {
    "sft": SFT(),
    "csft": CSFT(good="<|good|>", bad="<|bad|>"),
    "dpo": DPO(beta=0.1),
    "cdpo": CDPO(beta=0.1, epsilon=0.2),
    "kto": KTO(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, reference_point=True, value="logistic"),
    "slic": SLiC(beta=1.0, lambda_coef=0.1),
    "orpo": ORPO(lambda_coef=0.25),
    "ppo": PPOOffline(
        clip_low=0.5,
        clip_high=2.0,
        reward="label",
        critic=True,
        gamma=0.99,
        gae_lambda=0.95,
        critic_coef=0.01,
        kl_coef=0.1,
    ),
}
"""The numbers of the report's and the ICML paper's tables."""
MODELS = {
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "pythia-6.9b": "EleutherAI/pythia-6.9b",
    "pythia-12b": "EleutherAI/pythia-12b",
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-30b": "huggyllama/llama-30b",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
}
SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=64),
}
Fit = Callable[..., HalosCLI]


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    folders = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, config in FAMILIES.items():
        lm = load_model(ModelSource(config={"model_type": config.model_type, **config.to_diff_dict()}))
        lm.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs in conversation."""

    def says(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {
            "prompt": says("user", f"Tell {i}."),
            "chosen": says("assistant", f"A cat {i}!"),
            "rejected": says("assistant", f"no {i * i}"),
        }
        for i in range(40)
    ]
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def fit(models: dict[str, Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Runs `fit` with configs of the folder, in this process and an empty folder; returns what ran."""
    monkeypatch.chdir(tmp_path)
    ran: list[HalosCLI] = []
    after = HalosCLI.after_fit

    def keep(self: HalosCLI) -> None:
        ran.append(self)
        after(self)

    monkeypatch.setattr(HalosCLI, "after_fit", keep)

    def fit(*configs: str, family: str = "gpt_neox", dry: bool = True, **options: Any) -> HalosCLI:
        words = ["fit", *(word for name in configs for word in ("--config", f"archangel/{name}.yaml"))]
        options = {"model__policy": models[family], "data__train": pairs, "trainer__accelerator": "cpu"} | options
        options |= {"trainer__enable_progress_bar": "false"} | ({"trainer__fast_dev_run": "true"} if dry else {})
        words += [word for key, value in options.items() for word in ("--" + key.replace("__", "."), str(value))]
        monkeypatch.setattr(sys, "argv", ["halos_pl", *words])
        assert main() == 0
        return ran.pop()

    return fit


def test_the_folder_holds_what_is_tested() -> None:
    assert {x.stem for x in FOLDER.glob("*.yaml")} == OBJECTIVES.keys() | {"recipe", "later"}
    assert {x.stem for x in (FOLDER / "models").glob("*.yaml")} == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_a_models_file_names_it(name: str) -> None:
    assert yaml.safe_load((FOLDER / "models" / f"{name}.yaml").read_text()) == {"model": {"policy": MODELS[name]}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_runs_on_every_family(name: str, family: str, fit: Fit, tmp_path: Path) -> None:
    cli = fit("recipe", name, family=family)
    model, data, run = cli.model, cli.datamodule, cli.trainer
    assert run.global_step == 1
    assert model.policy.lm.config.model_type == family
    assert model.objective == OBJECTIVES[name]
    assert data.mismatch == ("batch" if name == "kto" else "dataset")

    optimizer = run.optimizers[0]
    assert type(optimizer) is torch.optim.RMSprop
    assert optimizer.defaults["lr"] == optimizer.param_groups[0]["lr"] == 5e-7
    assert optimizer.defaults["momentum"] == optimizer.defaults["weight_decay"] == 0
    assert (model.schedule, model.warmup) == ("constant", 150)
    assert run.gradient_clip_val == 10
    assert run.precision == "bf16-mixed"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert any(getattr(x, "gradient_checkpointing", False) for x in model.policy.lm.modules())
    assert cli.config["fit"].seed_everything == data.seed == 1
    assert run.max_epochs == 1
    assert (data.batch_size, data.eval_batch_size) == (32, 16)
    assert (data.max_length, data.max_prompt_length) == (2048, 1024)
    assert data.encoder.max_length == 128, "the model's"
    assert data.tokenizer.chat_template == TEMPLATES["tulu2-halos"]
    assert not any(tmp_path.iterdir()), "a dry run writes nothing"


def test_a_step_moves_the_policy_by_the_papers_learning_rate(fit: Fit, models: dict[str, Path]) -> None:
    """RMSprop's first step is lr / sqrt(1 − 0.99) = 5e-6 wherever there is a gradient."""
    cli = fit("recipe", "kto", family="llama")
    start = load_model(ModelSource(str(models["llama"]))).state_dict()
    now = cli.model.policy.lm.state_dict()
    largest = max((now[key] - start[key]).abs().max().item() for key in start)
    assert largest == pytest.approx(5e-6, rel=0.05)


def test_what_the_later_paper_advises(fit: Fit) -> None:
    cli = fit("recipe", "kto", "later")
    (group,) = cli.trainer.optimizers[0].param_groups
    assert type(cli.trainer.optimizers[0]) is torch.optim.AdamW
    assert (group["initial_lr"], group["weight_decay"]) == (5e-6, 0.0)
    assert (cli.model.schedule, cli.model.warmup) == ("cosine", 0.1)
    assert cli.model.objective == OBJECTIVES["kto"]
    assert (cli.datamodule.mismatch, cli.trainer.gradient_clip_val) == ("batch", 10), "the rest stays"


def test_alignment_goes_on_from_sft(fit: Fit, tmp_path: Path) -> None:
    short = {"trainer__max_steps": 2, "model__warmup": 1, "model__optimizer__lr": 1e-3, "data__batch_size": 16}
    sft = fit("recipe", "sft", family="mistral", dry=False, **short)
    assert sft.trainer.global_step == 2
    folder = tmp_path / "runs" / "sft" / "policy"
    kto = fit("recipe", "kto", model__policy="runs/sft/policy")
    assert kto.model.reference_source.name == "runs/sft/policy"
    trained = load_model(ModelSource(str(folder))).state_dict()
    for scorer, tolerance in ((kto.model.reference, 0.0), (kto.model.policy, 2e-5)):
        for key, value in scorer.lm.state_dict().items():
            torch.testing.assert_close(value, trained[key], atol=tolerance, rtol=0)
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATES["tulu2-halos"]
