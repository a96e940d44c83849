"""Log-probabilities from hidden states, ours beside other libraries': errors, then time and memory, interleaved."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import kernel_memory
from benchmarks.kernel_peers import OURS, PASSES, PEERS, PRODUCTS, Cannot, load_peer, told
from benchmarks.kernel_problem import (
    DTYPES,
    SEQUENCE,
    Logp,
    Problem,
    Shape,
    Truth,
    errors,
    logratio_errors,
    make_heads,
    make_problem,
    truth64,
)
from benchmarks.kernel_report import RESULTS, environment, picture, positive, table, writable, write

LIMIT = "torch.mm"
ONE_THIRD = Shape(683, 512, 32000)  # 2048 positions of which a third is scored
TINY = Shape(96, 64, 3000)
SHAPES = {
    "cpu": [ONE_THIRD],
    "cuda": [Shape(8192, 4096, v) for v in (32000, 128256)] + [Shape(8192, d, 151936) for d in (896, 2048, 4096, 8192)],
}
LOGP_LIMIT, LOGRATIO_LIMIT = 2e-5, 1e-3  # nats
GRADIENT_LIMIT = {"bfloat16": 6e-3, "float16": 6e-3, "float32": 1e-5}  # of norms
WRONG = 0.1  # relative error of a gradient that is not the asked one
GATE = {"times_naive": 1.1, "memory": 0.5}  # ours / naive, at most
FLUSH_BYTES = 256 << 20  # more than the L2 of a GPU
Key = tuple[str, str, str, str]  # shape, dtype, pass, implementation


class Failed(Exception):
    """Ours broke its contract."""


def check(options: argparse.Namespace, peers: dict[str, Logp]) -> dict[Key, dict[str, Any]]:
    """Errors of all implementations against float64, as the beginnings of the report's rows.

    Raises `Failed` if one of ours is out of bounds; other implementations may err as they like.
    """
    rows: dict[Key, dict[str, Any]] = {}
    failures = []
    for shape, dtype in cases(options):
        problem = make_problem(shape, DTYPES[dtype], options.device, options.seed)
        truths = {False: truth64(problem)}
        if any(PEERS[name].total for name in peers):
            truths[True] = truth64(replace(problem, upstream=torch.ones_like(problem.upstream)))
        for name, logp in peers.items():
            for what in options.passes:
                row = compare(name, logp, problem, what, truths[PEERS[name].total])
                rows[str(shape), dtype, what, name] = row
        del problem, truths
        batch = replace(shape, tokens=SEQUENCE * max(1 if options.quick else 4, shape.tokens // SEQUENCE))
        heads = make_heads(make_problem(batch, DTYPES[dtype], options.device, options.seed), 0.002, options.seed)
        for name, logp in peers.items():
            own = [rows[str(shape), dtype, what, name] for what in options.passes]
            if not PEERS[name].total and any(row["status"] == "measured" for row in own):
                try:
                    with PEERS[name].around():
                        error = logratio_errors(heads, logp, SEQUENCE)["logratio_rms"]
                except Exception as failure:
                    if name in OURS:
                        raise Failed(f"{name}: {told(failure)}") from failure
                    continue
                for row in own:
                    row["logratio_error"] = error
        for key, row in rows.items():
            if key[:2] == (str(shape), dtype) and key[3] in OURS:
                failures += [f"{' '.join(key)}: {x}" for x in complaints(row, dtype, key[3])]
    if failures:
        raise Failed("\n".join(failures))
    return rows


def cases(options: argparse.Namespace) -> Iterator[tuple[Shape, str]]:
    return ((shape, dtype) for shape in options.shapes for dtype in options.dtypes)


def compare(name: str, logp: Logp, problem: Problem, what: str, truth: Truth) -> dict[str, Any]:
    """One pass at full size: its errors, or why there are none."""
    try:
        found = errors(truth, PEERS[name].run(logp, problem, what))
    except Cannot as error:
        return {"status": "cannot", "reason": str(error)}
    except Exception as error:  # whatever another library raises on this shape, dtype or device is the answer
        return {"status": "cannot", "reason": told(error)}
    row = {"status": "measured", "errors": found}
    bad = [f"{k} {x:.1e}" for k, x in found.items() if k.endswith("_grad") and not x <= WRONG]
    if bad and name not in OURS:
        where = "summed" if PEERS[name].total else "each with an upstream gradient of its own"
        return row | {"status": "cannot", "reason": f"wrong gradient for tokens {where}: error of {', '.join(bad)}"}
    return row


def complaints(row: dict[str, Any], dtype: str, name: str) -> list[str]:
    """What breaks the contract; a forced strategy may lack a pass, `ours` may not."""
    if row["status"] != "measured":
        return [row["reason"]] if name == "ours" or not row["reason"].startswith("ValueError") else []
    found = row["errors"] | {"logratio": row["logratio_error"]}
    limits = {"logp": LOGP_LIMIT, "logratio": LOGRATIO_LIMIT}
    bounds = {k: limits.get(k, GRADIENT_LIMIT[dtype]) for k in found}
    return [f"{k} error {x:.2e} > {bounds[k]:.0e}" for k, x in found.items() if not x <= bounds[k]]


def stopwatch(device: str) -> Callable[[Callable[[], object]], float]:
    """Milliseconds of a call; on CUDA by events, with a cold L2."""

    def cpu(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    if device == "cpu":
        return cpu
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def cuda(work: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))

    return cuda


def interleave(work: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each, round after round, each round beginning with another one; the first round is not timed."""
    clock, names = stopwatch(device), list(work)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        work[name]()
    for r in range(repeats):
        turn = r % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(clock(work[name]))
    return samples


def measure(options: argparse.Namespace, peers: dict[str, Logp], rows: dict[Key, dict[str, Any]]) -> None:
    """Adds times and memory to the rows, and rows of the bare product."""
    for shape, dtype in cases(options):
        problem = make_problem(shape, DTYPES[dtype], options.device, options.seed)
        for what in options.passes:
            works = {x for x in peers if rows[str(shape), dtype, what, x]["status"] == "measured"}
            timed = measure_pass(options, {x: peers[x] for x in peers if x in works}, problem, what)
            for name, row in timed.items():
                rows[str(shape), dtype, what, name] = rows.get((str(shape), dtype, what, name), {}) | row
        if options.device == "cpu":
            for name in peers:
                own = {x: row for x in options.passes if "ms" in (row := rows[str(shape), dtype, x, name])}
                for what, mib in kernel_memory.on_cpu(name, str(shape), dtype, options.seed, list(own)).items():
                    own[what]["peak_mib"] = mib


def measure_pass(
    options: argparse.Namespace, peers: dict[str, Logp], problem: Problem, what: str
) -> dict[str, dict[str, Any]]:
    """Times of one pass of all implementations and of the bare product; on CUDA their memory too."""
    work = {name: partial(PEERS[name].run, logp, problem, what) for name, logp in peers.items()}
    rows: dict[str, dict[str, Any]] = {name: {"status": "measured"} for name in (LIMIT, *work)}
    if options.device == "cuda":
        for name in work:
            rows[name]["peak_mib"] = kernel_memory.on_cuda(work[name])
    product = problem.hidden.new_empty(len(problem.targets), len(problem.weight))
    limit = partial(torch.mm, problem.hidden, problem.weight.t(), out=product)
    samples = interleave({LIMIT: limit, **work}, options.repeats, options.device)
    for name, ms in samples.items():
        rows[name]["ms"] = {"median": statistics.median(ms), "min": min(ms)}
        if name != LIMIT:
            rows[name]["fraction"] = PRODUCTS[what] * statistics.median(samples[LIMIT]) / rows[name]["ms"]["median"]
        if "naive" in samples and name != LIMIT:
            rows[name]["times_naive"] = statistics.median(a / b for a, b in zip(ms, samples["naive"], strict=True))
    return rows


def gate(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What of ours costs too much beside naive."""
    ours, naive = (next(row for row in rows if row["implementation"] == x) for x in ("ours", "naive"))
    if "peak_mib" not in ours or "peak_mib" not in naive:
        return ["memory could not be measured on this system"]
    ratios = {"times_naive": ours["times_naive"], "memory": ours["peak_mib"] / naive["peak_mib"]}
    return [f"{k}: {x:.2f}, at most {GATE[k]} was asked" for k, x in ratios.items() if not x <= GATE[k]]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, metavar="N,d,V", help="tokens, width, vocabulary")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--passes", nargs="+", choices=PASSES, help="default: all")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default: all that can be on the device")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--repeats", type=positive, help="timed rounds; default: 20 on cuda, 7 on cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny shape and few repeats: to see that it runs")
    parser.add_argument("--gate", action="store_true", help="fail if ours costs too much beside naive, on the cpu")
    parser.add_argument(
        "--out", type=writable, help="JSON; default: results/kernels-DEVICE.json, none for quick and gate"
    )
    parser.add_argument("--plot", type=writable, metavar="PNG", help="draw the rows")
    parser.add_argument("--commit", help="for the report, where the folder has no history")
    options = parser.parse_args(argv)
    there = torch.cuda.is_available()
    fixed = [x for x in ("shapes", "dtypes", "passes", "peers", "quick") if options.gate and getattr(options, x)]
    if fixed:
        parser.error(f"--gate has its own shape, dtype, pass and peers: leave out --{fixed[0]}")
    options.device = options.device or ("cuda" if there and not options.gate else "cpu")
    if options.device == "cuda" and not there:
        parser.error("--device cuda: torch finds no GPU")
    if options.gate:
        if options.device != "cpu":
            parser.error("--gate is for --device cpu")
        options.shapes, options.dtypes, options.passes = [ONE_THIRD], ["float32"], ["forward+backward"]
        options.peers, options.repeats = ["naive", "ours"], options.repeats or 9
    options.shapes = options.shapes or ([TINY] if options.quick else SHAPES[options.device])
    options.dtypes = options.dtypes or ["bfloat16" if options.device == "cuda" else "float32"]
    options.passes = options.passes or list(PASSES)
    absent = ("ours-tiled", "ours-chunked", "ours-eager") if options.device == "cpu" else ()
    options.peers = list(dict.fromkeys(options.peers or [x for x in PEERS if x not in absent]))
    if options.repeats is None:
        options.repeats = 3 if options.quick else {"cuda": 20, "cpu": 7}[options.device]
    if options.out is None and not (options.quick or options.gate):
        options.out = RESULTS / f"kernels-{options.device}.json"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options, load = parse(argv), os.getloadavg()[0]
    peers: dict[str, Logp] = {}
    missing: dict[str, str] = {}
    for name in options.peers:
        try:
            peers[name] = load_peer(name, options.device)
        except Cannot as error:
            missing[name] = str(error)
    try:
        rows = check(options, peers)
    except Failed as error:
        print(f"not timed, the results are wrong:\n{error}", file=sys.stderr)
        return 1
    measure(options, peers, rows)
    named = []
    for shape, dtype in cases(options):
        for what in options.passes:
            for name in (LIMIT, *options.peers):
                row = rows.get((str(shape), dtype, what, name)) or {"status": "missing", "reason": missing[name]}
                key = {"shape": str(shape), "dtype": dtype, "pass": what, "implementation": name}
                named.append(key | row)
    settings = {
        "shape": "tokens,width,vocabulary",
        "repeats": options.repeats,
        "seed": options.seed,
        "products": PRODUCTS,
        "logratio_tokens": SEQUENCE,
    }
    report = {"benchmark": "kernels", **environment(options.device, options.commit), "settings": settings}
    report["rows"] = named
    if options.out is not None:
        write(options.out, report)
    print(table(named))
    if options.plot is not None:
        picture(options.plot, report)
    failures = gate(named) if options.gate else []
    if failures and load > 0.5:
        failures.append(f"the load was {load:.1f} before: on a busy machine threads wait for each other, measure again")
    print("\n".join(failures), file=sys.stderr, end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
