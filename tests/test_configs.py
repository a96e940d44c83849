"""Every YAML that ships is parsed and instantiated, without the network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from halos_pl.cli import HalosCLI, run
from halos_pl.config_files import resolve_configs, shipped_configs
from halos_pl.fsdp import FSDP, register

FILES = sorted(str(path.relative_to(shipped_configs())) for path in shipped_configs().rglob("*.yaml"))
DATA = [name for name in FILES if name.startswith("data/")]  # a source of a hub dataset, for other configs
TRAINERS = [name for name in FILES if name.startswith("trainer/")]  # devices, for other configs
CONFIGS = sorted(set(FILES) - {*DATA, *TRAINERS})


def test_there_are_configs() -> None:
    assert {"kto.yaml", "dpo.yaml", "sft.yaml", "recipes/kto.yaml", "model/tiny-llama.yaml"} <= set(CONFIGS)


@pytest.mark.parametrize("name", DATA)
def test_data_fragments_go_beside_a_recipe(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their keys are the parser's, and rows of theirs in a local copy are found missing before the hub is asked."""
    reader, split = yaml.safe_load((shipped_configs() / name).read_text())["data"]["train"].values()
    argv = ["fit", "--config", "recipes/sft.yaml", "--config", name, "--model.policy", str(tiny_model)]
    assert run([*argv, "--data.train.path", "COPY.jsonl", "--runs", str(tmp_path)]) == 2
    assert "data.train: 'COPY.jsonl': no such file or folder" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["halos_pl", *resolve_configs(argv), "--print_config"])
    with pytest.raises(SystemExit):
        HalosCLI()
    source = yaml.safe_load(capsys.readouterr().out)["data"]["train"]
    assert (source["reader"], source["split"], source["path"]) == (reader, split, None)


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_fragments_go_beside_a_recipe(
    name: str, tiny_model: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instantiated on one CPU, for which devices, nodes and replicas become 1."""
    monkeypatch.chdir(tmp_path)
    assert (shipped_configs() / name).read_bytes().isascii()
    argv = ["fit", "--config", "recipes/kto.yaml", "--config", name, "--model.policy", str(tiny_model)]
    argv += ["--data.train", str(pairs_file), "--trainer.devices", "1", "--trainer.num_nodes", "1"]
    argv += ["--trainer.accelerator", "cpu"]
    sharded = "one-gpu" not in name
    if "replicas" in (shipped_configs() / name).read_text():
        argv += ["--trainer.strategy.replicas", "1"]
    monkeypatch.setattr(sys, "argv", ["halos_pl", *resolve_configs(argv)])
    monkeypatch.setattr(HalosCLI, "fit", lambda self, **kwargs: None, raising=False)
    register()
    cli = HalosCLI()
    assert isinstance(cli.trainer.strategy, FSDP) == sharded
    assert cli.trainer.precision == "bf16-mixed"


@pytest.mark.parametrize("name", CONFIGS)
def test_config_instantiates(
    name: str, tiny_model: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything up to training: model and data objects, all rows read, the trainer."""
    monkeypatch.chdir(tmp_path)
    path = shipped_configs() / name
    assert path.read_bytes().isascii(), "a locale may read it in another encoding"
    argv = ["fit", "--config", str(path)]
    if "nano:" not in path.read_text():  # what ships brings its model and data
        source = ["--model.tokenizer"] if "config:" in path.read_text() else ["--model.policy"]
        argv += [*source, str(tiny_model), "--data.train", str(pairs_file)]
    if "split:" in path.read_text():  # our rows have no split; a null takes them all
        argv += ["--data.train_split", "null", "--data.validation_split", "null", "--data.eos_token", "null"]
    monkeypatch.setattr(sys, "argv", ["halos_pl", *argv])
    monkeypatch.setattr(HalosCLI, "fit", lambda self, **kwargs: None, raising=False)
    cli = HalosCLI()
    assert len(cli.datamodule.datasets["train"]) > 0
    assert cli.trainer.max_epochs is not None
