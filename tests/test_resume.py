"""A run that goes on is the run that was never interrupted: parameters, optimizer, rows and curves, to the bit."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos_pl.checkpoints import CheckpointError, open_checkpoint
from halos_pl.data.records import DataWarning
from halos_pl.export_command import export
from halos_pl.losses import BCO
from halos_pl.run_folder import RunError

WORKER = Path(__file__).with_name("resume_worker.py")
WORK = runpy.run_path(str(WORKER))
Case = WORK["Case"]
Results = dict[str, Any]

CASES = {
    "plain": Case(),
    "workers": Case(workers=2),
    "accumulated": Case(accumulate=2, workers=2),
    "accumulated, an epoch that ends in mid-window": Case(accumulate=4),
    "max_steps": Case(max_steps=15),
    "validated in mid-epoch": Case(validate=0.5),
    "validated at epoch ends": Case(validate=1.0, workers=2),
    "validated across epochs": Case(validate=4, data={"group_by_length": True}),
    "adapters that drop out": Case(adapter_dropout=0.3),
    "limited": Case(limit=0.75),
    "running mean": Case(objective=BCO(beta=0.5), data={"max_tokens": 500}),
}


@pytest.fixture(scope="module")
def files(tiny_model: Path, thumbs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    rows = thumbs_file.read_text().splitlines(keepends=True)[:48]
    few = tmp_path_factory.mktemp("rows") / "thumbs.jsonl"
    few.write_text("".join(rows))
    return {"model": str(tiny_model), "thumbs": str(few)}


def same(part: Results, whole: Results, step: int) -> None:
    assert part["steps"] == whole["steps"]
    assert part["rows"] == [row for row in whole["rows"] if row[0] >= step]
    assert torch.equal(part["parameters"], whole["parameters"])
    assert len(part["state"]) == len(whole["state"])
    assert all(torch.equal(x, y) for x, y in zip(part["state"], whole["state"], strict=True))
    assert part["curves"] == whole["curves"]


def resume_at(name: str, files: dict[str, str], folder: Path, steps: Sequence[int]) -> None:
    case = CASES[name]
    whole = WORK["train"](case, files, folder)
    there = sorted(int(x.name[5:-5]) for x in (folder / "checkpoints").glob("step=*"))
    assert there == [*range(1, whole["steps"] + 1)]
    if not case.data:
        assert len({tuple(rows) for _, rows in whole["rows"]}) == len(whole["rows"]), "no two micro-batches are alike"
    for step in steps:
        same(WORK["resumed"](case, files, folder, step), whole, step)


@pytest.mark.parametrize("name", CASES)
def test_resumed(name: str, files: dict[str, str], tmp_path: Path) -> None:
    """In mid-epoch, after the last step of an epoch, and in a later one."""
    end = CASES[name].steps
    resume_at(name, files, tmp_path / "run", (1, 3, end, end + 2) if name in ("plain", "workers") else (1, end))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_resumed_anywhere(name: str, files: dict[str, str], tmp_path: Path) -> None:
    resume_at(name, files, tmp_path / "run", range(1, 2 * CASES[name].steps + 2))


@pytest.fixture(scope="module")
def ranks(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results, Results]:
    """What each of the two ranks found, and where their checkpoints are."""
    out = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([*launch, *files.values(), str(out)], env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-4000:]
    first, second = (torch.load(out / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    return out, first, second


@pytest.mark.parametrize("step", WORK["RANKED_STEPS"])
@pytest.mark.parametrize("name", WORK["RANKED"])
def test_resumed_on_two_ranks(name: str, step: int, ranks: tuple[Path, Results, Results]) -> None:
    for found in ranks[1:]:
        same(found[name][step], found[name]["whole"], step)


@pytest.mark.parametrize("name", WORK["RANKED"])
def test_two_ranks_go_on_as_one(
    name: str, ranks: tuple[Path, Results, Results], files: dict[str, str], tmp_path: Path
) -> None:
    """With the rows of a step unchanged."""
    whole = ranks[1][name]["whole"]
    (tmp_path / "run").symlink_to(ranks[0] / name)
    part = WORK["resumed"](Case(adam=WORK["RANKED"][name].adam), files, tmp_path / "run", 3)
    assert part["steps"] == whole["steps"]
    if name == "sharded":
        torch.testing.assert_close(part["parameters"], whole["parameters"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("step", [3, 6])
def test_two_ranks_go_on_as_one_with_smaller_micro_batches(
    step: int, ranks: tuple[Path, Results, Results], files: dict[str, str], tmp_path: Path
) -> None:
    """Which are counted anew: the rows are those that one process sees."""
    case = Case(batch=4, accumulate=2, adam=False)
    alone = WORK["train"](case, files, tmp_path / "alone")
    (tmp_path / "run").symlink_to(ranks[0] / "sharded")
    part = WORK["resumed"](case, files, tmp_path / "run", step)
    assert part["rows"] == [row for row in alone["rows"] if row[0] >= step]


@pytest.mark.parametrize("name", WORK["RANKED"])
def test_a_checkpoint_of_two_ranks_exports_in_one_process(
    name: str, ranks: tuple[Path, Results, Results], files: dict[str, str], tmp_path: Path
) -> None:
    whole = ranks[1][name]["whole"]
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "checkpoints").symlink_to(ranks[0] / name / "checkpoints")
    settings = {"model": {"policy": files["model"]}, "data": {"train": files["thumbs"]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    places = export(folder)
    assert str(folder / "policy") in places["policy"]
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    assert torch.equal(torch.cat([p.flatten() for p in model.parameters()]), whole["parameters"])
    assert AutoTokenizer.from_pretrained(folder / "policy").eos_token == "</s>"
    assert f"for {whole['steps']} optimizer steps" in (folder / "policy" / "README.md").read_text()
    assert str(folder / f"policy-step={whole['steps']}") in export(folder)["policy"]
    stored = open_checkpoint(folder / "checkpoints" / "last.ckpt").tensors().shapes
    assert not [x for x in stored if "reference" in x]
    assert len([x for x in stored if x.startswith("model.")]) == len([*model.parameters()])


def test_what_export_refuses(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not the folder of a run"):
        export(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {}")
    with pytest.raises(RunError, match="ended before its first checkpoint"):
        export(tmp_path)
    (tmp_path / "checkpoints" / "step=3.ckpt").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step=3.ckpt" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        export(tmp_path)


def test_other_rows_in_mid_epoch_are_told(files: dict[str, str], tmp_path: Path) -> None:
    case = Case()
    WORK["train"](case, files, tmp_path / "run")
    with pytest.warns(DataWarning, match="the order of the data differ .* middle of an epoch"):
        WORK["resumed"](case._replace(data={"sampler": "stratified"}), files, tmp_path / "run", 3)
