"""The quickstart over seeds, beside its controls: the table and the picture of the README."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import environment

ROOT = Path(__file__).resolve().parents[1]
FITS = {
    "KTO": ["--config", "kto.yaml"],
    "KTO, labels shuffled": ["--config", "kto.yaml", "--data.shuffle_labels", "true"],
    "DPO": ["--config", "dpo.yaml"],
    "KTO after SFT": ["--config", "kto.yaml", "--model.policy", "{sft}"],
}
FIGURES = (
    "samples/verified",
    "samples/verified_low",
    "samples/verified_high",
    "samples/kl",
    "samples/distinct",
    "text/nll",
)


def fit(argv: Sequence[str], runs: Path, name: str) -> tuple[list[dict[str, float]], float]:
    """One run in a process of its own: the rows of its validations, and its seconds."""
    shutil.rmtree(runs / name, ignore_errors=True)  # of a run that was stopped
    command = [sys.executable, "-m", "halos_pl", "fit", *argv, "--runs", str(runs), "--name", name]
    command += ["--trainer.enable_progress_bar", "false"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    rows = []
    with (runs / name / "csv" / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if values := {k.removeprefix("val/"): float(x) for k, x in row.items() if k.startswith("val/") and x}:
                rows.append({"step": float(row["step"])} | values)
    return rows, seconds


def measure(seed: int, options: argparse.Namespace) -> None:
    """All methods of a seed that the results lack; the file is written after each run."""
    results = load(options.out)
    for name in options.only:
        if any(row["method"] == name and row["seed"] == seed for row in results["rows"]):
            continue
        sft = options.work / f"sft-{seed}" / "policy"
        if "{sft}" in FITS[name] and not sft.is_dir():
            fit(["--config", "sft.yaml", "--seed_everything", str(seed), *options.fit], options.work, f"sft-{seed}")
        argv = [word.replace("{sft}", str(sft)) for word in FITS[name]]
        run = f"{list(FITS).index(name)}-{seed}"
        rows, seconds = fit([*argv, "--seed_everything", str(seed), *options.fit], options.work, run)
        before, after = ({k: x[k] for k in FIGURES} for x in (rows[0], rows[-1]))
        results["rows"].append(
            {"method": name, "seed": seed, "before": before, "after": after, "seconds": round(seconds, 1)}
            | {"options": options.fit, "git_commit": environment()["git_commit"]}
        )
        write(options.out, results)
        print(f"{name}, seed {seed}: {share(before)} -> {share(after)} in {seconds:.0f} s", flush=True)


def load(path: Path, command: str = "python -m benchmarks.quickstart") -> dict[str, Any]:
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {"command": command, **environment(), "rows": []}


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def share(x: dict[str, float]) -> str:
    low, high = 100 * x["samples/verified_low"], 100 * x["samples/verified_high"]
    return f"{100 * x['samples/verified']:.1f} % ({low:.0f}–{high:.0f})"


def table(results: dict[str, Any]) -> str:
    """Markdown: one line a run, the start first."""
    lines = [
        "| | seed | verified (90 %) | KL, nats a sequence | text loss | distinct | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = sorted(results["rows"], key=lambda row: (list(FITS).index(row["method"]), row["seed"]))
    start = next((row for row in rows if "{sft}" not in FITS[row["method"]]), rows[0])["before"]
    figures = f"0 | {start['text/nll']:.3f} | {start['samples/distinct']:.2f}"
    lines.append(f"| the model that ships | | {share(start)} | {figures} | |")
    for row in rows:
        x = row["after"]
        figures = f"{x['samples/kl']:.1f} | {x['text/nll']:.3f} | {x['samples/distinct']:.2f} | {row['seconds']:.0f}"
        start = 100 * row["before"]["samples/verified"]
        lines.append(f"| {row['method']} | {row['seed']} | {start:.1f} → {share(x)} | {figures} |")
    return "\n".join(lines)


def picture(path: Path, options: argparse.Namespace) -> None:
    """Verified share, KL and reward margin over the steps of seed 0, validated every 20 steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "samples/verified": "share of granted wishes",
        "samples/kl": "KL to the reference, nats a sequence",
        "rewards/margin": "reward margin on held-out feedback",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.4), layout="constrained")
    for name, colour in (("KTO", "#1b6ca8"), ("KTO, labels shuffled", "#a0a0a0"), ("DPO", "#d1692c")):
        often = ["--trainer.val_check_interval", "20", *options.fit]
        rows, _ = fit([*FITS[name], *often], options.work, f"curves-{list(FITS).index(name)}")
        for axis, key in zip(axes, panels, strict=True):
            steps = [row["step"] for row in rows if key in row]
            axis.plot(steps, [row[key] for row in rows if key in row], label=name, color=colour, linewidth=2)
    for axis, title in zip(axes, panels.values(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer steps")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1)
    axes[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quickstart", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quickstart.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(FITS), default=list(FITS))
    parser.add_argument("--work", type=Path, default=Path("runs", "quickstart"), help="folder of the runs")
    parser.add_argument("--picture", type=Path, help="draw the curves of seed 0 to this file")
    parser.add_argument("--fit", nargs=argparse.REMAINDER, default=[], help="last: more options for every fit")
    options = parser.parse_args(argv)
    options.work = options.work.resolve()
    for seed in options.seeds:
        measure(seed, options)
    print(table(load(options.out)))
    if options.picture is not None:
        picture(options.picture, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
