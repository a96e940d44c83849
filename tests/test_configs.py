"""Every YAML that ships is parsed and instantiated, without the network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from halos_pl.cli import HalosCLI
from halos_pl.config_files import shipped_configs

CONFIGS = sorted(str(path.relative_to(shipped_configs())) for path in shipped_configs().rglob("*.yaml"))


def test_there_are_configs() -> None:
    assert {"kto.yaml", "dpo.yaml", "sft.yaml", "recipes/kto.yaml", "model/tiny-llama.yaml"} <= set(CONFIGS)


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
