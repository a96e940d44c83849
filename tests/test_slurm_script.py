"""docs/slurm.sbatch with stand-ins for SLURM's commands: when it requeues, and what reaches the ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "slurm.sbatch"


def run(folder: Path, srun: str, *, signalled: bool, restarts: int = 0) -> tuple[int, str]:
    """Exit status of the script, and what it said to `scontrol`, if anything."""
    commands = {"srun": f'echo "$@" > argv\ntouch began\n{srun}', "scontrol": 'echo "$@" > requeued'}
    for name, text in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "align", "SLURM_JOB_NUM_NODES": "2"}
    env |= {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_RESTART_COUNT": str(restarts)}
    job = subprocess.Popen(["bash", str(SCRIPT)], cwd=folder, env=env)
    while signalled and not (folder / "began").exists():
        time.sleep(0.02)
    if signalled:
        time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
    status = job.wait(20)
    told = folder / "requeued"
    return status, told.read_text().strip() if told.exists() else ""


SAVES = "trap 'sleep 0.3; exit 138' USR1\nwhile true; do sleep 0.05; done"


def test_the_ranks_are_signalled_and_the_job_is_requeued(tmp_path: Path) -> None:
    assert run(tmp_path, SAVES, signalled=True) == (138, "requeue 7")
    assert "--ckpt_path auto" in (tmp_path / "argv").read_text()
    assert "--name align" in (tmp_path / "argv").read_text()


@pytest.mark.parametrize(
    ("srun", "signalled", "restarts", "expected"),
    [
        ("exit 0", False, 0, (0, "")),
        ("exit 2", False, 0, (2, "")),  # a mistake would come again
        ("exit 143", False, 0, (143, "")),  # scancel
        ("exit 75", False, 0, (75, "requeue 7")),
        ("exit 75", False, 100, (75, "")),
        ("trap 'exit 0' USR1\nwhile true; do sleep 0.05; done", True, 0, (0, "")),  # it had just ended
    ],
)
def test_other_ends(srun: str, signalled: bool, restarts: int, expected: tuple[int, str], tmp_path: Path) -> None:
    assert run(tmp_path, srun, signalled=signalled, restarts=restarts) == expected
