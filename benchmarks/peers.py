"""Our KTO against TRL's KTOTrainer: speed and memory on the same rows, a fresh process each, alternating.

Nothing but the standard library is imported at the top: what a child process imports is its own baseline.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("ours", "trl")
TARGET = {"speed": 1.5, "memory": 1.0}  # ours / TRL's: at least, at most
BETA, LEARNING_RATE, CLIP, MAX_LENGTH, LOG_EVERY, SEED = 0.3, 3e-4, 1.0, 256, 10, 0
MIB = 1 << 20


@dataclass(frozen=True)
class Job:
    """What both peers get.

    Args:
        model: folder in Hugging Face format.
        rows: JSONL of prompt, completion, label.
        order: of these rows in the epoch: both peers train on the same batches.
        batch_size: examples of a step; the last batch may be smaller.
        warmup: steps before the clock starts.
        eos_token: ends a completion; None: the tokenizer's.
    """

    model: str
    rows: str
    order: tuple[int, ...]
    batch_size: int
    warmup: int
    eos_token: str | None


class Recorder:
    """Time, losses and memory of one training, filled by a peer's callback at the end of each step."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.baseline, self.started = peak_memory(), time.perf_counter()
        self.ends: list[float] = []
        self.losses: list[Any] = []  # 0-d tensors

    def step(self, loss: Any) -> None:
        self.losses.append(loss.detach())
        self.ends.append(time.perf_counter())

    def result(self, peer: str, tokens: Iterable[tuple[Sequence[int], Sequence[int], bool]]) -> dict[str, Any]:
        """The child's report.

        Args:
            peer: its name.
            tokens: prompt ids, completion ids and label of each row, in the order of training.
        """
        fit_seconds, memory = time.perf_counter() - self.started, peak_memory() - self.baseline
        losses = [float(loss) for loss in self.losses]
        timed = len(self.job.order) - self.job.warmup * self.job.batch_size
        digest, prompts, completions = hashlib.sha256(), 0, 0
        for prompt, completion, label in tokens:
            digest.update(json.dumps([list(map(int, prompt)), list(map(int, completion)), bool(label)]).encode())
            prompts, completions = prompts + len(prompt), completions + len(completion)
        tail = losses[-max(1, len(losses) // 4) :]
        return {
            "peer": peer,
            "examples_per_second": timed / (self.ends[-1] - self.ends[self.job.warmup - 1]),
            "fit_seconds": fit_seconds,
            "baseline_mib": self.baseline / MIB,
            "memory_mib": memory / MIB,
            "first_loss": losses[0],
            "last_quarter_loss": statistics.fmean(tail),
            "steps": len(losses),
            "rows": len(self.job.order),
            "prompt_tokens": prompts,
            "completion_tokens": completions,
            "data_sha256": digest.hexdigest(),
        }


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes.

    Linux: VmHWM, which begins anew at exec; ru_maxrss would begin at the parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ------------------------------------------------------------------------------------------------ the peers


def train_ours(job: Job) -> dict[str, Any]:
    import lightning as L
    import torch

    from halos_pl.data import AlignmentData
    from halos_pl.losses import KTO
    from halos_pl.module import AlignmentModule

    recorder = Recorder(job)

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            recorder.step(outputs["loss"])

    module = AlignmentModule(
        KTO(beta=BETA),
        policy=job.model,
        optimizer=lambda params: torch.optim.AdamW(params, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        schedule="constant",
        warmup=0,
    )
    data = AlignmentData(
        train=job.rows, eos_token=job.eos_token, max_length=MAX_LENGTH, batch_size=job.batch_size, seed=SEED
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=CLIP,
        log_every_n_steps=LOG_EVERY,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Record()],
    )
    trainer.fit(module, datamodule=data)
    examples = [data.datasets["train"].rows[i][0] for i in job.order]
    return recorder.result("ours", ((x.prompt, x.completion, bool(x.desirable)) for x in examples))


def train_trl(job: Job) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import KTOConfig, KTOTrainer

    recorder = Recorder(job)

    class Recorded(KTOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.last_loss = super().compute_loss(*args, **kwargs)
            return self.last_loss

    class Record(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            recorder.step(trainer.last_loss)

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    if job.eos_token is not None:
        tokenizer.eos_token = job.eos_token
    with tempfile.TemporaryDirectory() as folder:
        dataset = load_dataset("json", data_files=job.rows, split="train", cache_dir=folder).select(job.order)
        config = KTOConfig(
            output_dir=folder,
            beta=BETA,
            max_length=MAX_LENGTH,
            per_device_train_batch_size=job.batch_size,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=CLIP,
            gradient_checkpointing=False,
            bf16=False,
            model_init_kwargs={"dtype": torch.float32},
            use_cpu=True,
            dataloader_num_workers=0,
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        )
        trainer = Recorded(
            job.model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[Record()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        rows = trainer.train_dataset
        return recorder.result("trl", ((x["prompt_ids"], x["completion_ids"], x["label"]) for x in rows))


TRAIN = {"ours": train_ours, "trl": train_trl}


# ------------------------------------------------------------------------------------------------ the parent


def write_rows(data: str, limit: int | None, target: Path) -> tuple[int, ...]:
    """One random member of each pair of split train as JSONL, and the order of the rows in our first epoch."""
    from halos_pl.data.records import as_unpaired
    from halos_pl.data.sampling import EpochSampler
    from halos_pl.data.sources import load_records

    members = as_unpaired(load_records(data, "train").records[:limit], members="one", seed=SEED)
    rows = [{"prompt": x.prompt, "completion": x.completion, "label": x.desirable} for x in members]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tuple(EpochSampler(len(rows), shuffle=True, seed=SEED))


def run_child(peer: str, job_file: Path) -> dict[str, Any]:
    """One training in a fresh process; its last line is the report."""
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--child", peer, str(job_file)],
        cwd=ROOT,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{peer} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Least, median and largest of each figure, the ratios ours / TRL's, and what the two must agree on."""
    by_peer = {peer: [run for run in runs if run["peer"] == peer] for peer in PEERS}
    summary: dict[str, Any] = {}
    for peer, own in by_peer.items():
        if own:
            figures = ("examples_per_second", "fit_seconds", "memory_mib", "first_loss", "last_quarter_loss")
            summary[peer] = {x: _spread([run[x] for run in own]) for x in figures}
    if all(by_peer.values()):
        pairs = list(zip(by_peer["ours"], by_peer["trl"], strict=True))
        summary["ratio"] = {
            name: {
                "of_medians": summary["ours"][figure]["median"] / summary["trl"][figure]["median"],
                "per_pair": [a[figure] / b[figure] for a, b in pairs],
                "target": TARGET[name],
            }
            for name, figure in (("speed", "examples_per_second"), ("memory", "memory_mib"))
        }
    agree = ("steps", "rows", "prompt_tokens", "completion_tokens", "data_sha256")
    summary["same_data"] = all(run[x] == runs[0][x] for run in runs for x in agree)
    summary["starts_at_one_half"] = all(abs(run["first_loss"] - 0.5) < 1e-6 for run in runs)
    return summary


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def table(report: dict[str, Any]) -> str:
    """The report for a reader."""
    summary, rows = report["summary"], []
    names = {
        "examples_per_second": "examples/s",
        "fit_seconds": "whole fit, s",
        "memory_mib": "peak − imports, MiB",
        "first_loss": "loss, first step",
        "last_quarter_loss": "loss, last quarter",
    }
    rows.append(f"{'':22}{'peer':6}{'min':>10}{'median':>10}{'max':>10}")
    for figure, name in names.items():
        for peer in (x for x in PEERS if x in summary):
            digits = 4 if "loss" in figure else 1
            cells = "".join(f"{summary[peer][figure][x]:10.{digits}f}" for x in ("min", "median", "max"))
            rows.append(f"{name:22}{peer:6}{cells}")
    for name, ratio in summary.get("ratio", {}).items():
        pairs = ", ".join(f"{x:.2f}" for x in ratio["per_pair"])
        bound = f"{'≥' if name == 'speed' else '≤'} {ratio['target']}"
        rows.append(f"{name}, ours / trl: {ratio['of_medians']:.2f} of medians; per pair {pairs}; target {bound}")
    rows.append(f"same rows, tokens and batches: {'yes' if summary['same_data'] else 'NO'}")
    rows.append(f"loss of the first step is 0.5: {'yes' if summary['starts_at_one_half'] else 'NO'}")
    return "\n".join(rows)


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
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "peers.json")
    parser.add_argument("--quick", action="store_true", help="one repeat of 16 steps: to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeats, options.rows = 1, min(options.rows or sys.maxsize, 16 * options.batch_size)
    for name in ("rows", "batch_size", "repeats"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if "trl" in options.peers and importlib.util.find_spec("trl") is None:
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


def child(peer: str, job_file: str) -> None:
    values = json.loads(Path(job_file).read_text())
    with redirect_stdout(sys.stderr):
        result = TRAIN[peer](Job(**values))
    print(json.dumps(result))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    options = parse()
    report = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
