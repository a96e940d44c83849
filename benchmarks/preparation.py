"""From a file of feedback to micro-batches: seconds and memory, ours and TRL's, over the same rows.

`python -m benchmarks.preparation` writes one million rows and prepares them twice (the second time they are found in
the cache). The first of these rows are a file of their own, which we and TRL's KTOTrainer prepare, each with as many
processes as there are cores.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import ROOT, environment

JOBS = ("ours", "ours, again", "ours, first rows", "TRL, first rows")
BATCH_SIZE, MAX_LENGTH, SEED = 32, 512, 0


def write_rows(path: Path, count: int, chat: bool) -> None:
    """Requests with several sentences of stories as answers, 50 to 60 words a row, labels by a coin."""
    from halos_pl.nano.wishes import corpus

    stories = [row["completion"] for row in corpus(SEED, 4000) if "completion" in row]
    rng = random.Random(SEED)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = f"Request {number}: tell me more. {rng.choice(stories)}"
            completion = " ".join(rng.choices(stories, k=rng.randint(1, 3)))
            row: dict[str, Any] = {"prompt": prompt, "completion": f" {completion}", "label": rng.random() < 0.5}
            if chat:
                row["prompt"] = [{"role": "user", "content": prompt}]
                row["completion"] = [{"role": "assistant", "content": completion}]
            file.write(json.dumps(row) + "\n")


class Memory(threading.Thread):
    """The most that this process and its children held at a time, in bytes; pages that they share count once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, sum(map(_proportional, _family(os.getpid()))))
            time.sleep(0.1)


def _family(process: int) -> list[int]:
    try:
        names = [x for task in Path(f"/proc/{process}/task").iterdir() for x in (task / "children").read_text().split()]
    except OSError:
        return []
    return [process, *(x for name in names for x in _family(int(name)))]


def _proportional(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def ours(file: str, model: str) -> dict[str, Any]:
    from halos_pl.batch import DataNeeds
    from halos_pl.data import AlignmentData

    memory, begun = Memory(), time.perf_counter()
    data = AlignmentData(train=file, batch_size=BATCH_SIZE, max_length=MAX_LENGTH, seed=SEED)
    data.needs = DataNeeds("unpaired", mismatched=True, tokenizer=model, vocab_size=2**31, max_positions=None)
    data.setup("fit")
    prepared = time.perf_counter() - begun
    next(iter(data.train_dataloader()))
    first = time.perf_counter() - begun - prepared
    return {
        "rows": len(data.datasets["train"]),
        "setup_s": prepared,
        "first_batch_s": first,
        "peak_mib": memory.peak / 2**20,
    }


def trl(file: str, model: str) -> dict[str, Any]:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    peer: Any = importlib.import_module("trl")
    trainer_class, config_class = peer.KTOTrainer, peer.KTOConfig
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    memory, begun = Memory(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = load_dataset("json", data_files=file, split="train", cache_dir=folder)
        config = config_class(
            output_dir=folder,
            max_length=MAX_LENGTH,
            per_device_train_batch_size=BATCH_SIZE,
            dataset_num_proc=os.cpu_count(),
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        trainer = trainer_class(lm, args=config, train_dataset=rows, processing_class=tokenizer)
        prepared = time.perf_counter() - begun
        next(iter(trainer.get_train_dataloader()))
        first = time.perf_counter() - begun - prepared
    return {"rows": len(rows), "setup_s": prepared, "first_batch_s": first, "peak_mib": memory.peak / 2**20}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Each job in a process of its own, one after the other."""
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        rows, few = Path(folder, "rows.jsonl"), Path(folder, "few.jsonl")
        write_rows(rows, options.rows, options.chat)
        with rows.open("rb") as whole, few.open("wb") as part:
            part.writelines(line for _, line in zip(range(options.trl_rows), whole, strict=False))
        quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", "TMPDIR": folder}
        for job in JOBS:
            if job.endswith("first rows") and not options.trl_rows:
                continue
            file = few if job.endswith("first rows") else rows
            child = [sys.executable, "-m", "benchmarks.preparation", "--job", job, "--file", str(file)]
            done = subprocess.run(
                child,
                cwd=ROOT,
                env={**os.environ, **quiet, "HALOS_CACHE": f"{folder}/cache"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"{job} failed:\n{done.stderr[-4000:]}")
            runs[job] = json.loads(done.stdout.splitlines()[-1])
            runs[job]["rows_per_s"] = runs[job]["rows"] / runs[job]["setup_s"]
        size = rows.stat().st_size
    settings = {
        "rows": options.rows,
        "bytes": size,
        "format": "conversational" if options.chat else "plain",
        "tokenizer": "nano:model",
        "processes": os.cpu_count(),
    }
    return {"benchmark": "preparation", **environment(), "settings": settings, "runs": runs}


def table(report: dict[str, Any]) -> str:
    lines = ["|  | rows | seconds | rows/s | peak, MiB |", "|---|---:|---:|---:|---:|"]
    for job, run in report["runs"].items():
        cells = run["rows"], run["setup_s"], run["rows_per_s"], run["peak_mib"]
        lines.append("| {} | {:,} | {:.1f} | {:,.0f} | {:,.0f} |".format(job, *cells))
    return "\n".join(lines)


def missed(report: dict[str, Any]) -> list[str]:
    """What is not as it must be: memory, a second start, and twice the rows a second of TRL."""
    runs = report["runs"]
    limits = {
        f"peak of {runs['ours']['peak_mib']:,.0f} MiB, 2,048 allowed": runs["ours"]["peak_mib"] > 2048,
        f"second start in {runs['ours, again']['setup_s']:.1f} s, 5 allowed": runs["ours, again"]["setup_s"] > 5,
    }
    if JOBS[3] in runs:
        ratio = runs[JOBS[2]]["rows_per_s"] / runs[JOBS[3]]["rows_per_s"]
        limits[f"{ratio:.2f} times the rows a second of TRL, 2 wanted"] = ratio < 2
    return [name for name, wrong in limits.items() if wrong]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.preparation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--trl-rows", type=int, default=100_000, help="the first rows, for both; 0: without TRL")
    parser.add_argument("--chat", action="store_true", help="conversational rows, through a chat template")
    parser.add_argument("--gate", action="store_true", help="exit with 1 where a limit is missed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "preparation.json")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rows < 1 or not 0 <= options.trl_rows <= options.rows:
        parser.error("--rows must be at least 1, --trl-rows from 0 to that")
    if options.job is None and options.trl_rows and importlib.util.find_spec("trl") is None:
        parser.error("trl is not installed: pip install 'halos-pl[bench]', or measure ours alone: --trl-rows 0")
    return options


def main() -> None:
    options = parse()
    if options.job is not None:
        from halos_pl.nano.shipped import locate

        prepare = trl if options.job.startswith("TRL") else ours
        print(json.dumps(prepare(options.file, locate("nano:model"))))
        return
    report = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(report))
    if options.gate and (wrong := missed(report)):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
