"""How far log-ratios are from float64 when logits, or losses, are rounded on the way: the case for float32 logits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_peers import OURS, PEERS, Cannot, load_peer, told
from benchmarks.kernel_problem import (
    DTYPES,
    SEQUENCE,
    Heads,
    Logp,
    Problem,
    Shape,
    logratio_errors,
    logratios,
    make_heads,
    make_problem,
)
from benchmarks.kernel_report import RESULTS, environment, markdown, writable, write

FULL, SMALL = Shape(8 * SEQUENCE, 1024, 32768), Shape(2 * SEQUENCE, 64, 2048)
PERTURBATIONS = (0.002, 0.02)
BAR = 1e-3  # nats, at 512 tokens
HEADER = (
    *("path", "perturbation", "true log-ratio, std", "token error, rms", "log-ratio error, rms"),
    "policy = reference: log-ratio",
)
PATHS = {
    **{name: "ours" + name[4:].replace("-", ", ") for name in OURS},
    "trl": "TRL ChunkedLogProbFunction",
    "liger-semantics": "Liger chunked KTO/DPO, its roundings in plain torch",
    "liger": 'Liger fused linear cross-entropy, reduction="none"',
    "torch": 'torch F.linear_cross_entropy, reduction="none"',
    "cce": 'cut-cross-entropy, reduction="none"',
}


def rounded_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits in the inputs' dtype, log-softmax in float32, a sequence at a time."""
    chunks = zip(hidden.split(SEQUENCE), targets.split(SEQUENCE), strict=True)
    return torch.cat([F.log_softmax((h @ weight.t()).float(), -1).gather(1, y[:, None])[:, 0] for h, y in chunks])


def largest_self_ratio(logp: Logp, problem: Problem) -> float:
    """Largest |log-ratio| of a policy that equals its reference: once as it is, once with the rows in another order."""
    order = torch.randperm(len(problem.targets), generator=torch.Generator().manual_seed(0)).to(problem.targets.device)
    hidden, targets = problem.hidden[order], problem.targets[order]
    with torch.no_grad():
        reference = logp(problem.hidden, problem.weight, problem.targets)
        same = logp(problem.hidden.clone(), problem.weight.clone(), problem.targets)
        moved = torch.empty_like(reference).index_copy_(0, order, logp(hidden, problem.weight, targets))
    return max((policy - reference).abs().max().item() for policy in (same, moved))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each path and perturbation; the weight and the hidden states are bfloat16."""
    paths: dict[str, Logp] = {"liger-semantics": rounded_logits}
    rows: list[dict[str, Any]] = []
    names = [x for x in PATHS if x not in OURS or x == "ours" or options.device == "cuda"]
    for name in names:
        try:
            paths[name] = paths.get(name) or load_peer(name, options.device)
        except Cannot as error:
            rows.append({"path": name, "status": "missing", "reason": str(error)})
    shape = SMALL if options.quick else FULL
    reference = make_problem(shape, DTYPES["bfloat16"], options.device, options.seed)
    for perturbation in PERTURBATIONS:
        heads = make_heads(reference, perturbation, options.seed)
        spread = logratios(*heads.truth, SEQUENCE).std().item()
        for name in (x for x in names if x in paths):
            row = {"path": name, "perturbation": perturbation, "true_logratio_std": spread}
            rows.append(row | measure_path(name, paths[name], heads))
    return rows


def measure_path(name: str, logp: Logp, heads: Heads) -> dict[str, Any]:
    try:
        with PEERS[name].around() if name in PEERS else nullcontext():
            found = logratio_errors(heads, logp, SEQUENCE)
            return {"status": "measured", **found, "largest_self_ratio": largest_self_ratio(logp, heads.reference)}
    except Exception as error:  # of another library, on this device
        if name == "ours":
            raise
        return {"status": "cannot", "reason": told(error)}


def complaints(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where ours is not within the bar, or a policy that equals its reference has another log-ratio than 0."""
    found = []
    for row in rows:
        if row["path"] in OURS and row["status"] == "measured":
            where = f"{row['path']}, perturbation {row['perturbation']}"
            if not row["logratio_rms"] < BAR:
                found.append(f"{where}: log-ratio error {row['logratio_rms']:.1e} nats, below {BAR} was asked")
            if row["largest_self_ratio"] != 0:
                found.append(f"{where}: policy = reference, but log-ratio {row['largest_self_ratio']:.1e} nats")
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = []
    reasons: dict[str, None] = {}  # in order, each once
    for row in rows:
        if row["status"] != "measured":
            reasons[f"{PATHS[row['path']]}: {row['reason']}"] = None
            continue
        figures = (f"{row['true_logratio_std']:.3f}", f"{row['token_rms']:.1e}", f"{row['logratio_rms']:.1e}")
        lines.append((PATHS[row["path"]], str(row["perturbation"]), *figures, f"{row['largest_self_ratio']:.1e}"))
    return "\n".join([markdown(HEADER, lines), *([""] if reasons else []), *reasons])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.numerics", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny shape: to see that it runs")
    parser.add_argument("--out", type=writable, help="JSON; default: results/numerics.json, none for quick")
    parser.add_argument("--commit", help="for the report, where the folder has no history")
    options = parser.parse_args(argv)
    there = torch.cuda.is_available()
    options.device = options.device or ("cuda" if there else "cpu")
    if options.device == "cuda" and not there:
        parser.error("--device cuda: torch finds no GPU")
    rows = measure(options)
    if options.out is None and not options.quick:
        options.out = RESULTS / "numerics.json"
    settings = {"shape": str(SMALL if options.quick else FULL), "dtype": "bfloat16", "seed": options.seed}
    settings |= {"sequence": SEQUENCE, "bar": BAR}
    if options.out is not None:
        report = {"benchmark": "numerics", **environment(options.device, options.commit), "settings": settings}
        write(options.out, report | {"rows": rows})
    print(table(rows))
    failures = complaints(rows)
    print("\n".join(failures), file=sys.stderr, end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
