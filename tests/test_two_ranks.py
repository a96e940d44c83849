"""Two ranks against one process with the same rows a step: losses, metrics, parameters. One launch for all tests."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("two_ranks_worker.py")
WORK = runpy.run_path(str(WORKER))
CASES = WORK["CASES"]
Results = dict[str, Any]


@pytest.fixture(scope="module")
def files(tiny_model: Path, pairs_file: Path, thumbs_file: Path) -> dict[str, str]:
    return {"model": str(tiny_model), "pairs": str(pairs_file), "thumbs": str(thumbs_file)}


@pytest.fixture(scope="module")
def ranks(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    """What each of the two ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([*launch, *files.values(), str(out)], env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-4000:]
    return tuple(torch.load(out / f"rank{r}.pt", weights_only=True) for r in (0, 1))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process_does(name: str, ranks: tuple[Results, Results], files: dict[str, str]) -> None:
    alone = WORK["train"](CASES[name], files, ranks=1)
    together = ranks[0][name]
    assert len(together["rows"]) == len(alone["rows"]) == WORK["STEPS"]
    for ours, truth in zip(together["rows"], alone["rows"], strict=True):
        for row in (ours, truth):
            row.pop("train/tokens_per_second")
        assert ours == pytest.approx(truth, abs=1e-9, rel=0)
    assert together["held_out"] == pytest.approx(alone["held_out"], abs=1e-9, rel=0)
    assert "val/samples/distinct" in alone["held_out"]
    assert "val/text/nll" in alone["held_out"]
    for ours, truth in zip(together["said"], alone["said"], strict=True):
        assert ours[:2] == truth[:2], "prompt and completion"
        assert ours[2] == pytest.approx(truth[2], abs=1e-9)
    torch.testing.assert_close(together["parameters"], alone["parameters"], atol=1e-9, rtol=0)
    assert torch.equal(together["parameters"], ranks[1][name]["parameters"])
    losses = [row["train/loss"] for row in alone["rows"]]
    assert max(losses) - min(losses) > 1e-3, "nothing was learned, so nothing was tested"


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("mean of 2 and 4 rows", 12 / 6),  # mean of the ranks' means: 2.25; without the true zero: 2.4
        ("mean of 2 and 0 rows", 3.0),
        ("mean of no rows", 0.0),
        ("z0 of a positive mean", 12 / 6),  # clamped before the mean over ranks: 2.5 or 3.33
        ("z0 of a negative mean", 0.0),
        ("running mean after 1", 12 / 6),
        ("running mean after 2", 28 / 9),  # a mean of the batches' means: 3.67; of the ranks': 2.95
        ("running mean after 3", 28 / 9),
        ("step gradient", 55 / 10),
        ("agreed", 1.0),  # the group of it ends with the others: left over, it would abort the process
        ("average loss", 24 / 6),
        ("average rewards/desirable", 4.0),  # a class on one rank only
        ("average rewards/undesirable", 1.5),
        ("average rewards/margin", 2.5),
    ],
)
def test_uneven_ranks(what: str, expected: float, ranks: tuple[Results, Results]) -> None:
    assert [rank["uneven"][what] for rank in ranks] == pytest.approx([expected, expected], abs=1e-12)
