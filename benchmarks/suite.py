"""The paper's comparison on the nano model: every objective, and KTO's ablation, over seeds. The tables of the README.

Each runs with the configuration that ships for it, tuned by hand, of 3, 6 or 10 epochs: configurations are compared,
not equal compute. Runs that the results have are not repeated, so the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median
from threading import Lock
from typing import Any

import torch

from benchmarks.peers import environment
from benchmarks.quickstart import ROOT, fit, load, write
from halos_pl.data.collate import sequences
from halos_pl.data.records import Origin
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.tokenizers import load_tokenizer
from halos_pl.evaluate.interval import clopper_pearson
from halos_pl.losses import CSFT
from halos_pl.models import ModelSource, load_model
from halos_pl.quiet import quieten
from halos_pl.scoring import Scorer

COMMAND = "python -m benchmarks.suite --jobs 2"
PAIRS = ["--data.train", "nano:pairs", "--model.objective.desirable_weight", "1.2"]
OBJECTIVES = {
    "KTO": ["--config", "kto.yaml"],
    "DPO": ["--config", "dpo.yaml"],
    "SFT on the good stories": ["--config", "csft.yaml", "--model.objective", "SFT", "--data.sampler", "shuffle"],
    "CSFT": ["--config", "csft.yaml"],
    "cDPO": ["--config", "cdpo.yaml"],
    "IPO": ["--config", "ipo.yaml"],
    "SimPO": ["--config", "simpo.yaml"],
    "SLiC": ["--config", "slic.yaml"],
    "ORPO": ["--config", "orpo.yaml"],
    "offline PPO": ["--config", "ppo.yaml"],
    "KTO v1": ["--config", "kto-v1.yaml"],
    "APO-zero": ["--config", "apo-zero.yaml"],
    "BCO": ["--config", "bco.yaml"],
}
VALUE = ["--config", "kto.yaml", "--model.objective.value"]
ABLATION = {
    "KTO": OBJECTIVES["KTO"],
    "KTO from pairs, both y of each x": ["--config", "kto.yaml", *PAIRS],
    "KTO from pairs, one y per x": ["--config", "kto.yaml", *PAIRS, "--data.unpair", "one"],
    "no z0": ["--config", "kto.yaml", "--model.objective.reference_point", "false"],
    "concave v = log σ": [*VALUE, "log_logistic"],
    "risk-neutral v = identity": [*VALUE, "identity"],
    "reference-free, λ_D n_D = 1.75 λ_U n_U": [
        *("--config", "kto.yaml", "--model.reference", "none", "--model.objective.desirable_weight", "5.83")
    ],
} | {
    f"power value, α = {alpha}, λ = {aversion}": [
        *(*VALUE, "kahneman_tversky", "--model.objective.alpha", alpha, "--model.objective.loss_aversion", aversion)
    ]
    for alpha, aversion in (("0.88", "2.25"), ("0.7", "2.25"), ("1.0", "2.25"), ("0.88", "1.5"), ("0.88", "3.0"))
}
SETS = {"objectives": OBJECTIVES, "ablation": ABLATION}
METHODS = OBJECTIVES | ABLATION
PROMPTS = 400
"""Of `nano:prompts`, on each of which every run samples one story."""
FIGURES = ("samples/verified", "text/nll", "samples/distinct")


@torch.no_grad()
def divergence(run: Path, *, control: tuple[str, str] | None) -> float:
    """KL(π‖π_ref) in nats a completion on the last samples of a run: mean log-ratio to the model that ships.

    Args:
        run: folder of the run, with its policy and its samples.
        control: what ended the policy's prompts; the reference's end without.
    """
    samples = max((run / "samples").glob("step=*.jsonl"), key=lambda path: int(path.stem.split("=")[1]))
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    total = 0.0
    for sign, name, texts in ((1, str(run / "policy"), control), (-1, "nano:model", None)):
        scorer = Scorer(load_model(ModelSource(name))).eval()
        encoder = CompletionTokenizer(load_tokenizer("nano:model"), control=texts, max_length=512)
        origin = Origin(str(samples), 1)
        pairs = []
        for row in rows:
            tokens = encoder.encode(row["prompt"], _reply(row), origin=origin)
            drawn = tokens.completion if row["ended"] else tokens.completion[:-1]  # an EOS that was not drawn
            pairs.append((encoder.encode_prompt(row["prompt"], origin=origin), drawn))
        batch = sequences(pairs, pad_id=0, vocab_size=scorer.lm.config.vocab_size, length_groups=8)
        total += sign * float(scorer(batch).logp.double().sum()) / len(rows)
    return total


def _reply(row: dict[str, Any]) -> Any:
    text = row["completion"] or " "  # EOS at once; a completion needs a text
    return text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]


def measure(name: str, seed: int, options: argparse.Namespace, lock: Lock) -> None:
    """One run, unless the results have it; they are written at its end."""
    with lock:
        if any((row["method"], row["seed"]) == (name, seed) for row in load(options.out, COMMAND)["rows"]):
            return
    folder = f"{list(METHODS).index(name)}-{seed}"
    rows, seconds = fit([*METHODS[name], "--seed_everything", str(seed), *options.fit], options.work, folder)
    before, after = ({k: x[k] for k in FIGURES} for x in (rows[0], rows[-1]))
    after["kl"] = divergence(options.work / folder, control=CSFT().control if name == "CSFT" else None)
    row = {"method": name, "seed": seed, "before": before, "after": after, "seconds": round(seconds, 1)}
    row |= {"options": options.fit, "jobs": options.jobs, "git_commit": environment()["git_commit"]}
    with lock:
        results = load(options.out, COMMAND)
        results["rows"].append(row)
        write(options.out, results)
    verified = (100 * x["samples/verified"] for x in (before, after))
    print("{}, seed {}: {:.1f} -> {:.1f} % in {:.0f} s".format(name, seed, *verified, seconds), flush=True)


def table(results: dict[str, Any], methods: Sequence[str]) -> str:
    """Markdown: one line a method, over all its seeds."""
    lines = [
        "| | verified, each seed | over all (90 %) | KL, nats a sequence | text loss | distinct | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in methods:
        rows = sorted((row for row in results["rows"] if row["method"] == name), key=lambda row: row["seed"])
        if not rows:
            continue
        shares = [row["after"]["samples/verified"] for row in rows]
        ends = clopper_pearson(round(PROMPTS * sum(shares)), PROMPTS * len(shares))
        low, high = (100 * x for x in ends)
        kl, text, distinct = (fmean(row["after"][k] for row in rows) for k in ("kl", "text/nll", "samples/distinct"))
        cells = (
            name,
            " · ".join(f"{100 * x:.1f}" for x in shares),
            f"{100 * fmean(shares):.1f} % ({low:.0f}–{high:.0f})",
            *(f"{kl:.1f}", f"{text:.3f}", f"{distinct:.2f}"),
            f"{median(row['seconds'] for row in rows):.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "suite.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--work", type=Path, default=Path("runs", "suite"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on one core each")
    parser.add_argument("--fit", nargs=argparse.REMAINDER, default=[], help="last: more options for every fit")
    options = parser.parse_args(argv)
    options.work = options.work.resolve()
    quieten()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    lock = Lock()
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(measure, name, seed, options, lock) for seed in options.seeds for name in options.only]
        for run in runs:
            run.result()
    results = load(options.out, COMMAND)
    for title, methods in SETS.items():
        print(f"\n{title}\n\n{table(results, list(methods))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
