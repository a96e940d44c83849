"""environment.json of a run: what it ran with and on, one entry a start, without secrets."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch

from halos_pl import __version__

FILE = "environment.json"
PACKAGES = (
    *("torch", "triton", "lightning", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "torchmetrics"),
    *("peft", "bitsandbytes"),
)
VARIABLES = re.compile(
    r"(OMP_NUM_THREADS|MKL_NUM_THREADS|CUDA_VISIBLE_DEVICES|CUBLAS_WORKSPACE_CONFIG|PYTORCH_\w*ALLOC_CONF|PYTHONHASHSEED"
    r"|(NCCL|GLOO|TORCH|TRITON)_\w+|HALOS_(?!TOKENS_|RUN_NAME)\w+|TORCHELASTIC_(RUN_ID|RESTART_COUNT)|WORLD_SIZE|LOCAL_WORLD_SIZE|HF_HUB_OFFLINE"
    r"|SLURM_(JOB_ID|JOB_NUM_NODES|NNODES|NTASKS|NTASKS_PER_NODE|GPUS_ON_NODE|RESTART_COUNT|ARRAY_\w+_ID))"
)
"""The environment variables that are recorded; no other is."""
_SECRET = re.compile(
    r"(?<!eos_)(?<!bos_)(?<!pad_)token(?!iz)(?!s\b)|secret|passw|credential|api.?key|auth|(^|[._-])key$", re.IGNORECASE
)
_CREDENTIAL = re.compile(
    r"\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_-]{8,}"  # by the prefixes of those who give them out
    r"|(?<=://)[^/@\s]+(?=@)"  # user:password of an address
)


class RunRecord(L.Callback):
    """Writes `environment.json` when a training begins, by rank 0; a run that goes on adds its start to the list.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            append(self.folder / FILE, start() | {"world_size": trainer.world_size, "nodes": trainer.num_nodes})


def append(file: Path, entry: Mapping[str, Any]) -> None:
    """Add an entry to a file that holds {"starts": [...]}; the file is replaced in one move. One that cannot be read is
    put aside as `environment.json.unreadable`."""
    starts: list[Any] = []
    if file.exists():
        try:
            starts = list(json.loads(file.read_text(encoding="utf-8"))["starts"])
        except (ValueError, KeyError, TypeError):
            os.replace(file, file.with_name(file.name + ".unreadable"))
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(file.name + ".partial")
    text = json.dumps({"starts": [*starts, entry]}, indent=2, ensure_ascii=False)
    aside.write_text(text + "\n", encoding="utf-8")
    os.replace(aside, file)


def start() -> dict[str, Any]:
    """What this process runs with and on."""
    found = {"halos_pl": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": redact([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "versions": found,
        "git": {"halos_pl": git(Path(__file__).parent, of=Path(__file__).name), "working folder": git(Path.cwd())},
        "host": socket.gethostname(),
        "process": os.getpid(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": _devices(),
        "environment": variables(os.environ),
    }


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of VARIABLES that are set, whatever could be a secret blotted out."""
    return {
        name: "…" if _SECRET.search(name) else _CREDENTIAL.sub("…", value)
        for name, value in sorted(environment.items())
        if VARIABLES.fullmatch(name)
    }


def redact(command: Sequence[str]) -> list[str]:
    """A command line without the values of options that sound secret, and without known forms of credentials.

    >>> redact(["fit", "--hub.token", "abc", "--api_key=abc", "--data.max_tokens", "8", "hf_abcdefghijkl"])
    ['fit', '--hub.token', '…', '--api_key=…', '--data.max_tokens', '8', '…']
    """
    shown, hide = [], False
    for word in command:
        name, equals, _ = word.partition("=")
        secret = word.startswith("-") and _SECRET.search(name) is not None
        if hide and not word.startswith("--"):
            shown.append("…")
        elif secret and equals:
            shown.append(f"{name}=…")
        else:
            shown.append(_CREDENTIAL.sub("…", word))
        hide = secret and not equals
    return shown


def git(folder: Path, *, of: str = ".") -> dict[str, Any] | None:
    """Commit of the checkout that a folder lies in, and whether tracked files differ from it; None outside of one, and
    where the checkout has no such file (a library that is only installed below somebody's checkout)."""

    def ask(*words: str) -> str:
        # a repository is no program: no hooks, no file watcher that its configuration names
        command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *words]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return answer.stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", of)
        commit = ask("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{x.name}, {x.total_memory / 2**30:.0f} GiB" for x in names]
