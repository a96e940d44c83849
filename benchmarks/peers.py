"""Our KTO against TRL's KTOTrainer: speed and memory on the same rows, a fresh process each, alternating."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peer_run import BETA, CLIP, LEARNING_RATE, MAX_LENGTH, SEED, TRAIN, Job

ROOT = Path(__file__).resolve().parents[1]
PEERS = tuple(TRAIN)
TARGET = {"speed": 1.5, "memory": 1.0}  # ours / TRL's: at least, at most
AGREE = ("steps", "rows", "prompt_tokens", "completion_tokens", "data_sha256")
FIGURES = {
    "examples_per_second": "examples/s",
    "fit_seconds": "whole fit, s",
    "memory_mib": "peak − imports, MiB",
    "first_loss": "loss, first step",
    "last_quarter_loss": "loss, last quarter",
}


def write_rows(data: str, limit: int | None, target: Path) -> tuple[int, ...]:
    """One random member of each pair of split train as JSONL, and the order of the rows in our first epoch."""
    from halos_pl.data.batches import EpochBatches
    from halos_pl.data.records import Paired
    from halos_pl.data.sources import load_records

    pairs = [x for x in load_records(data, "train").records[:limit] if isinstance(x, Paired)]
    members = [x.member(random.Random(f"{SEED}:{x.origin.row}").random() < 0.5) for x in pairs]
    rows = [{"prompt": x.prompt, "completion": x.completion, "label": x.desirable} for x in members]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    epoch = EpochBatches(len(rows), batch_size=1, shuffle=True, seed=SEED)
    return tuple(row for batch in epoch for row in batch)


def run_child(peer: str, job_file: Path) -> dict[str, Any]:
    """One training in a fresh process; its last line is the report."""
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peer_run", peer, str(job_file)],
        cwd=ROOT,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{peer} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Least, median and largest of each figure, the ratios of ours to the others, and what all must agree on."""
    by_peer = {peer: own for peer in PEERS if (own := [run for run in runs if run["peer"] == peer])}
    spreads = {peer: {x: _spread([run[x] for run in own]) for x in FIGURES} for peer, own in by_peer.items()}
    ratios = {
        f"ours / {peer}": {
            name: {
                "of_medians": spreads["ours"][figure]["median"] / spreads[peer][figure]["median"],
                "per_pair": [a[figure] / b[figure] for a, b in zip(by_peer["ours"], own, strict=True)],
                "target": TARGET[name],
            }
            for name, figure in (("speed", "examples_per_second"), ("memory", "memory_mib"))
        }
        for peer, own in by_peer.items()
        if peer != "ours" and "ours" in by_peer
    }
    return {
        "peers": spreads,
        "ratios": ratios,
        "same_data": all(run[x] == runs[0][x] for run in runs for x in AGREE),
        "starts_at_one_half": all(abs(run["first_loss"] - 0.5) < 1e-6 for run in runs),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def table(report: dict[str, Any]) -> str:
    """The report for a reader."""
    summary = report["summary"]
    lines = [f"{'':22}{'':16}{'min':>10}{'median':>10}{'max':>10}"]
    for figure, name in FIGURES.items():
        for peer, spreads in summary["peers"].items():
            digits = 4 if "loss" in figure else 1
            cells = "".join(f"{spreads[figure][x]:10.{digits}f}" for x in ("min", "median", "max"))
            lines.append(f"{name:22}{peer:16}{cells}")
    for pair, ratios in summary["ratios"].items():
        for name, ratio in ratios.items():
            each = ", ".join(f"{x:.2f}" for x in ratio["per_pair"])
            bound = f"{'≥' if name == 'speed' else '≤'} {ratio['target']}"
            lines.append(f"{name}, {pair}: {ratio['of_medians']:.2f} of medians; per pair {each}; target {bound}")
    lines.append(f"same rows, tokens and order: {'yes' if summary['same_data'] else 'NO'}")
    lines.append(f"loss of the first step is 0.5: {'yes' if summary['starts_at_one_half'] else 'NO'}")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """The machine and the software."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    packages = ("torch", "lightning", "transformers", "trl", "accelerate")
    return {
        "device": {"cpu": cpu, "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()}
        | {x: version(x) for x in packages if importlib.util.find_spec(x)},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": len(_git("status", "--porcelain").splitlines()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder in Hugging Face format")
    parser.add_argument("--data", required=True, help="JSONL of prompt, chosen, rejected; its split train is used")
    parser.add_argument("--eos-token", help="ends a completion; default: the tokenizer's")
    parser.add_argument("--rows", type=int, help="of the split; default: all")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each peer")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["ours", "trl"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "peers.json")
    parser.add_argument("--quick", action="store_true", help="one repeat of 16 steps: to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeats, options.rows = 1, min(options.rows or sys.maxsize, 16 * options.batch_size)
    for name in ("rows", "batch_size", "repeats"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if set(options.peers) != {"ours"} and importlib.util.find_spec("trl") is None:
        parser.error("trl is not installed: pip install 'halos-pl[bench]', or measure ours alone: --peers ours")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs, and the report."""
    report = {"benchmark": "peers", **environment()}
    with tempfile.TemporaryDirectory() as folder:
        rows, job_file = Path(folder, "rows.jsonl"), Path(folder, "job.json")
        order = write_rows(options.data, options.rows, rows)
        steps = -(-len(order) // options.batch_size)
        if steps < 2:
            raise SystemExit(f"{len(order)} rows are {steps} step of {options.batch_size}: give more rows")
        model = str(Path(options.model).expanduser().resolve())
        job = Job(model, str(rows), order, options.batch_size, max(1, min(10, steps // 4)), options.eos_token)
        job_file.write_text(json.dumps(asdict(job)))
        runs = [run_child(peer, job_file) for _ in range(options.repeats) for peer in PEERS if peer in options.peers]
    settings = {
        "model": Path(options.model).name,
        "data": Path(options.data).name,
        "eos_token": options.eos_token,
        "objective": "kto",
        "beta": BETA,
        "optimizer": f"AdamW, fused, lr {LEARNING_RATE} constant, gradient norm clipped at {CLIP}",
        "dtype": "float32",
        "batch_size": options.batch_size,
        "max_length": MAX_LENGTH,
        "steps": steps,
        "warmup_steps": job.warmup,
    }
    return report | {"settings": settings, "summary": summarize(runs), "runs": runs}


def main() -> None:
    options = parse()
    report = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
