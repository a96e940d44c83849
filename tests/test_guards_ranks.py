"""Guards under two ranks: what one finds ends or skips the step on both, and a rank that hangs is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

WORKER = Path(__file__).with_name("guards_worker.py")


class Ended(NamedTuple):
    found: tuple[dict[str, Any], ...]
    log: str
    seconds: float


def launch(model: Path, thumbs: Path, out: Path, hang: str) -> Ended:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    run = subprocess.run(
        [*command, str(model), str(thumbs), str(out), hang],
        env=env | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 1, run.stderr[-4000:]
    found = tuple(torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    return Ended(found, run.stdout + run.stderr, time.monotonic() - start)


@pytest.fixture(scope="module")
def ended(tiny_model: Path, thumbs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return launch(tiny_model, thumbs_file, tmp_path_factory.mktemp("guards"), "sleep")


def test_ranks_agree(ended: Ended) -> None:
    assert [rank["agree"] for rank in ended.found] == [(1.0, 0.0, 0.25)] * 2


def test_a_step_that_one_rank_cannot_take_is_skipped_by_both(ended: Ended) -> None:
    for rank in ended.found:
        after = rank["skip"]["after"]
        assert rank["skip"]["skipped"] == 1
        assert len(after) == 5
        assert torch.equal(after[1], after[2])
        assert not torch.equal(after[2], after[3])
    assert torch.equal(*(rank["skip"]["after"][-1] for rank in ended.found))


def test_both_stop_and_say_the_same(ended: Ended) -> None:
    for what, told in (("stop", "the loss is not finite at step 3"), ("limit", "is not finite, after 0 skipped steps")):
        first, second = (rank[what]["told"] for rank in ended.found)
        assert first == second
        assert told in first


def test_a_rank_that_hangs_is_named(ended: Ended) -> None:
    told = re.findall(r"^halos_pl: error: (.*)$", ended.log, flags=re.M)
    assert told, ended.log[-3000:]
    assert all(re.search(r"rank 1 holds the others up: for \d+ s in (step 3|fetching)", line) for line in told), told
    assert re.search(r"exitcode *: 75", ended.log)
    assert ended.seconds < 60


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named(tiny_model: Path, thumbs_file: Path, tmp_path: Path) -> None:
    log = launch(tiny_model, thumbs_file, tmp_path, "stop").log
    assert re.search(r"rank 0 has been \d+ s in step 3; rank 1 no longer answers: its process \(host", log), log
