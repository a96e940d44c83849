"""Environment, JSON, table and picture of the kernel benchmarks."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """Device, commit, date and versions; `commit` where the folder has no history."""
    return {
        "device": _device(device),
        "commit": commit or _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {x: v for x in PACKAGES if (v := _version(x))},
    }


def _device(device: str) -> dict[str, Any]:
    if device == "cuda":
        return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    return {"cpu": cpu, "threads": torch.get_num_threads()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """HEAD, with "-dirty" where files differ from it."""
    try:
        head, changed = (
            subprocess.run(["git", *x], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for x in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if changed else "")


def writable(text: str) -> Path:
    """A file that can be written, as an option's value: before anything long starts."""
    path = Path(text)
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from None
    return path


def positive(text: str) -> int:
    """An option's value: an integer from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 on")
    return int(text)


def write(path: Path, report: dict[str, Any]) -> None:
    """JSON with one line for each row."""
    head = json.dumps({k: x for k, x in report.items() if k != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in report["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned."""
    cells = [list(header), *map(list, lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    aligned = ["| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([aligned[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *aligned[1:]])


HEADER = (
    *("N,d,V", "dtype", "pass", "", "ms, median", "min", "of torch.mm's rate", "× naive", "peak MiB"),
    *("log-ratio error, nats", "gradient error"),
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row of the report; a dash where nothing was measured, and the reason below."""
    lines: list[tuple[str, ...]] = []
    reasons: dict[str, None] = {}  # in order, each once
    for row in rows:
        ms, gradients = row.get("ms", {}), [x for k, x in row.get("errors", {}).items() if k.endswith("_grad")]
        figures = (
            _number(ms.get("median"), ".3f"),
            _number(ms.get("min"), ".3f"),
            _number(row.get("fraction"), ".2f"),
            _number(row.get("times_naive"), ".2f"),
            _number(row.get("peak_mib"), ".1f"),
            _number(row.get("logratio_error"), ".1e"),
            _number(max(gradients, default=None), ".1e"),
        )
        if row["status"] != "measured":
            only = "" if row["status"] == "missing" else f", {row['pass']}"
            reasons[f"{row['implementation']}{only}: {row['status']}: {row['reason']}"] = None
        if row["status"] == "missing":
            continue
        lines.append((row["shape"], row["dtype"], row["pass"], row["implementation"], *figures))
    return "\n".join([markdown(HEADER, lines), *([""] if reasons else []), *reasons])


def _number(x: float | None, form: str) -> str:
    return "–" if x is None else format(x, form)


def picture(path: Path, report: dict[str, Any]) -> None:
    """For each pass: the share of the bare product's rate, and the peak memory, over the shapes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report["rows"] if row["status"] == "measured" and row["implementation"] != "torch.mm"]
    passes, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("pass", "implementation"))
    cases = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    panels = {"fraction": "share of torch.mm's rate", "peak_mib": "peak memory, MiB"}
    size = (1.5 + max(3.0, 0.16 * len(names) * len(cases)) * len(passes), 6.4)
    figure, axes = plt.subplots(len(panels), len(passes), figsize=size, squeeze=False, layout="constrained")
    for line, (key, title) in zip(axes, panels.items(), strict=True):
        for axis, what in zip(line, passes, strict=True):
            for i, name in enumerate(names):
                own = {(x["shape"], x["dtype"]): x for x in rows if x["pass"] == what and x["implementation"] == name}
                heights = [own.get(case, {}).get(key) or 0.0 for case in cases]
                places = [x + (i - (len(names) - 1) / 2) * 0.8 / len(names) for x in range(len(cases))]
                axis.bar(places, heights, 0.8 / len(names), label=name, color=f"C{i % 10}")
            axis.set_title(f"{what}: {title}", fontsize=9)
            axis.set_xticks(range(len(cases)), ["\n".join(case) for case in cases], fontsize=7)
            axis.grid(axis="y", alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
