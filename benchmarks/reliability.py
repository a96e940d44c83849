"""Runs that are killed at random moments and go on, beside the same run undisturbed: the table of docs/reliability.md.

Each is killed with SIGKILL once to three times: at any moment from its start on, as soon as a checkpoint is being
written, or as soon as one is whole, and goes on with `--ckpt_path last`. What must be the same: every tensor of the
last checkpoint (parameters and optimizer) and the exported policy bit for bit, every row of the curves, and which rows
every micro-batch held. Runs that the results have are not repeated, so the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.quickstart import ROOT, load, write
from benchmarks.reliability_run import Training, being_written, outcome, seen, steps_there

COMMAND = "python -m benchmarks.reliability --runs 200"
ROWS, EPOCHS, PATIENCE = 9, 3, 300.0
MODEL = {
    "model_type": "llama",
    "vocab_size": 608,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "attention_dropout": 0.1,
}


@dataclass(frozen=True)
class Case:
    """A way to train.

    Args:
        ranks: processes; more than one with the strategy fsdp.
        options: of the command line.
        share: how often it is run, relative to others.
    """

    ranks: int
    options: tuple[str, ...]
    share: int


def _case(share: int, workers: int = 0, accumulate: int = 1, fsdp: str | None = None, **more: str) -> Case:
    options = ["--data.num_workers", str(workers), "--trainer.accumulate_grad_batches", str(accumulate)]
    for name, value in more.items():
        options += [f"--{name.replace('__', '.')}", value]
    if fsdp is not None:
        options += ["--trainer.strategy", "halos_pl.fsdp.FSDP", "--trainer.strategy.checkpoints", fsdp]
        options += ["--trainer.devices", "2"]
    return Case(1 if fsdp is None else 2, tuple(options), share)


CASES = {
    "one process": _case(4),
    "two data workers": _case(4, workers=2),
    "accumulation of 2": _case(4, accumulate=2, checkpoints__keep="2"),
    "accumulation of 2, dropout, two data workers": _case(4, workers=2, accumulate=2, model__dropout="true"),
    "end in the middle of an epoch": _case(4, trainer__max_steps="13", checkpoints__every_n_steps="2"),
    "two ranks, a file each": _case(1, fsdp="sharded"),
    "two ranks, a file each, accumulation of 2": _case(1, accumulate=2, fsdp="sharded"),
    "two ranks, one file": _case(1, fsdp="full"),
    "two ranks, one file, accumulation of 2": _case(1, accumulate=2, fsdp="full"),
}


def arguments(case: Case, work: Path, folder: Path) -> list[str]:
    """Of a run whose folder is `folder / "run"`."""
    return [
        *("fit", "--runs", str(folder), "--name", "run", "--model.objective", "KTO", "--model.optimizer.lr", "3e-3"),
        *("--model.config", str(work / "config.json"), "--model.tokenizer", "nano:model", "--data.max_length", "256"),
        *("--data.train", str(work / "rows.jsonl"), "--data.validation", str(work / "held-out.jsonl")),
        *("--data.batch_size", "2", "--data.eval_batch_size", "4", "--checkpoints.every_n_steps", "1"),
        *("--trainer.max_epochs", str(EPOCHS), "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "2"),
        *("--trainer.enable_progress_bar", "false", "--trainer.callbacks", "benchmarks.reliability_run.RowsSeen"),
        *("--trainer.callbacks.folder", str(folder), *case.options),
    ]


def prepare(work: Path) -> None:
    """Rows and model; and all that a training imports, so that its start is short."""
    import importlib

    import torch

    from halos_pl.nano.shipped import locate

    torch.set_num_threads(1)
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    os.environ.update(quiet | {"TOKENIZERS_PARALLELISM": "false", "HALOS_CACHE": str(work / "cache")})
    names = "halos_pl.cli", "transformers.models.llama.modeling_llama", "torch.utils.tensorboard", "pandas", "attrs"
    for name in names:
        importlib.import_module(name)
    work.mkdir(parents=True, exist_ok=True)
    (work / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    lines = Path(locate("nano:thumbs")).read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "rows.jsonl").write_text("".join(lines[:ROWS]), encoding="utf-8")
    (work / "held-out.jsonl").write_text("".join(lines[ROWS : ROWS + 6]), encoding="utf-8")


def undisturbed(case: Case, work: Path, folder: Path) -> dict[str, Any]:
    """What the run leads to, the rows of its micro-batches, and its seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    training = Training(arguments(case, work, folder), case.ranks, folder / "log")
    if training.wait(PATIENCE):
        raise RuntimeError((folder / "log").read_text()[-4000:])
    seconds = time.perf_counter() - training.began
    batches, wrong = seen(folder)
    if wrong:
        raise RuntimeError("\n".join(wrong))
    return {"outcome": outcome(folder / "run"), "batches": batches, "seconds": seconds}


def killed(case: Case, wanted: dict[str, Any], work: Path, folder: Path, rng: random.Random) -> dict[str, Any]:
    """One run: killed, gone on with until it ends, and compared."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run, began, kills = folder / "run", time.perf_counter(), []
    for _ in range(rng.choices((1, 2, 3), (6, 3, 1))[0]):
        if (kill := _killed_once(case, wanted, work, folder, rng)) is None:
            break
        kills.append(kill)
    if not kills:
        return {"kills": []}
    goes_on = ["--ckpt_path", "last"] if run.exists() else []
    training = Training([*arguments(case, work, folder), *goes_on], case.ranks, folder / "log")
    differs = []
    if status := training.wait(PATIENCE):
        differs.append(f"it ended with {status}: {(folder / 'log').read_text()[-1500:]}")
    else:
        found, (batches, wrong) = outcome(run), seen(folder)
        differs += [
            difference(key, value, found[key]) for key, value in wanted["outcome"].items() if found[key] != value
        ]
        differs += wrong + ([] if batches == wanted["batches"] else ["other rows"])
    return {"kills": kills, "seconds": round(time.perf_counter() - began, 1), "differs": differs}


def difference(key: str, wanted: Any, found: Any) -> str:
    """What differs, and the first place where it does."""
    if isinstance(wanted, dict):
        wanted, found = list(wanted.items()), list(found.items())
    if isinstance(wanted, list) and isinstance(found, list):
        return next((f"{key}: {b}, not {a}" for a, b in zip_longest(wanted, found) if a != b), key)
    return f"{key}: {found}, not {wanted}"


def _killed_once(
    case: Case, wanted: dict[str, Any], work: Path, folder: Path, rng: random.Random
) -> dict[str, Any] | None:
    """Start or go on, and kill. None: it had ended before."""
    run, how = folder / "run", rng.choices(("any moment", "in a save", "after a save"), (4, 4, 2))[0]
    order, gap = rng.sample(range(case.ranks), case.ranks), rng.choice((0.0, rng.uniform(0, 0.05)))
    before = steps_there(run)
    last = max(before, default=0)
    target = rng.randint(last + 1, max(last + 1, wanted["outcome"]["step"]))
    late, delay = rng.uniform(0, wanted["seconds"]), rng.choice((0.0, rng.uniform(0, 0.02)))
    goes_on = ["--ckpt_path", "last"] if run.exists() else []
    training = Training([*arguments(case, work, folder), *goes_on], case.ranks, folder / "log")
    while training.running():
        if how == "any moment":
            reached = time.perf_counter() - training.began >= late
        elif how == "in a save":
            reached = (being_written(run) or 0) >= target
        else:
            reached = max(steps_there(run), default=0) >= target
        if reached:
            time.sleep(delay if how != "any moment" else 0)
            break
        time.sleep(0.0005)
    if not training.running():
        if training.wait(PATIENCE):
            raise RuntimeError((folder / "log").read_text()[-4000:])
        return None
    training.kill(order, gap)
    there, partial = steps_there(run), being_written(run)
    return {"aim": how, "mid_save": partial is not None, "step": max(there, default=None)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs that the results lack; the file is written after each."""
    results = load(options.out, COMMAND)
    done = {row["run"] for row in results["rows"]}
    names = [name for name in options.only for _ in range(CASES[name].share)]
    wanted: dict[str, dict[str, Any]] = {}
    for number in range(options.runs):
        if number in done:
            continue
        name = names[number % len(names)]
        if name not in wanted:
            wanted[name] = undisturbed(CASES[name], options.work, options.work / "undisturbed")
        rng = random.Random(f"{options.seed}:{number}")
        row: dict[str, Any] = {"kills": []}
        while not row["kills"]:  # it had ended before it was killed
            row = killed(CASES[name], wanted[name], options.work, options.work / "killed", rng)
        results["rows"].append({"run": number, "case": name, **row})
        write(options.out, results)
        if row["differs"]:
            shutil.copytree(options.work / "killed", options.work / f"differs-{number}", symlinks=True)
        aims = ", ".join(f"{x['aim']} at {x['step']}" for x in row["kills"])
        print(f"{number}: {name}: killed {aims}: {'; '.join(row['differs']) or 'the same'}", flush=True)
    return results


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for each way to train, and one for all."""
    head = ["", "runs", "kills", "in mid-save", "before a checkpoint", "not bit for bit the same"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * 5}"]
    cases = [name for name in CASES if any(row["case"] == name for row in results["rows"])]
    for name in [*cases, "all"]:
        rows = [row for row in results["rows"] if name in ("all", row["case"])]
        kills = [kill for row in rows for kill in row["kills"]]
        counts = [len(rows), len(kills), sum(x["mid_save"] for x in kills), sum(x["step"] is None for x in kills)]
        counts.append(sum(bool(row["differs"]) for row in rows))
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.reliability", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "reliability.json")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "halos-reliability")
    options = parser.parse_args(argv)
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every run ended as the undisturbed one did."""
    options = parse(argv)
    prepare(options.work)
    results = measure(options)
    print(table(results))
    return int(any(row["differs"] for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
