"""What `python -m halos_pl estimate` says, beside what a small Llama takes: bytes held, sent, kept and worked with.

`python -m benchmarks.scaling` measures on the CPU: (a) a KTO step on two and on four gloo ranks under FSDP2, (b) what
autograd keeps for the backward pass, (c) the head. `--device cuda` measures (b), (c) and a step on one GPU.
`--tables` writes the tables of docs/scaling.md anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from halos_kernels import linear_logp
from torch import Tensor

from benchmarks.peers import ROOT, environment
from benchmarks.scaling_ranks import allocated, build, measure, rows
from benchmarks.scaling_tables import write_tables
from halos_pl.estimate import Lora, Plan, Shapes, communication, memory, read_shapes
from halos_pl.estimate.activations import activations
from halos_pl.estimate.head import head_workspace
from halos_pl.models import ModelSource

Row = dict[str, Any]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 1031,  # divides by nothing: padding counts
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
JOB = {"config": LLAMA, "rows": 4, "length": 128, "scored": 64, "checkpointing": False, "lora": 0, "accumulate": 1}
JOBS: dict[str, Row] = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "two micro-batches": {"accumulate": 2},
    "LoRA, checkpointing": {"lora": 8, "checkpointing": True},
    "few tokens": {"rows": 1, "length": 8, "scored": 4},
}
HELD = ("weights", "reference", "gradients", "optimizer", "accumulated")
SENT = ("all_gather", "reduce_scatter", "all_reduce")
HEADS = {"cpu": (683, 512, 32000), "cuda": (8192, 4096, 128256)}  # N, d, V


def row(part: str, case: str, quantity: str, measured: float, predicted: float) -> Row:
    found = {"part": part, "case": case, "quantity": quantity, "measured": measured, "predicted": predicted}
    return {**found, "ratio": round(measured / predicted, 4) if predicted else float(measured == predicted)}


def plan_of(job: Row, ranks: int) -> Plan:
    return Plan(
        rows=job["rows"],
        length=job["length"],
        gpus=ranks,
        shard=job["shard"],
        strategy="fsdp" if ranks > 1 else "single",
        scored=job["scored"] / job["length"],
        accumulate=job["accumulate"],
        compute="bfloat16" if ranks > 1 else "float32",
        checkpointing=job["checkpointing"],
        lora=Lora(job["lora"]) if job["lora"] else None,
    )


def launch(ranks: int, jobs: list[Row]) -> list[Row]:
    """What rank 0 of so many gloo ranks measures, all jobs in one launch."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder, "jobs.json"), Path(folder, "out.json")
        given.write_text(json.dumps(jobs), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [*command, "-m", "benchmarks.scaling_ranks", str(given), str(out)],
            cwd=ROOT,
            env={**os.environ, **quiet},
            capture_output=True,
            text=True,
            timeout=240,
        )
        if done.returncode:
            raise RuntimeError(f"{ranks} ranks failed:\n{done.stderr[-4000:]}")
        return list(json.loads(out.read_text(encoding="utf-8")))


def on_ranks(ranks: int, cases: dict[str, Row]) -> Iterator[Row]:
    """(a) Bytes that a rank holds and sends in a step, and its peak."""
    jobs = {name: JOB | {"shard": ranks} | case for name, case in cases.items()}
    shapes = read_shapes(ModelSource(config=dict(LLAMA)))
    for (name, job), found in zip(jobs.items(), launch(ranks, list(jobs.values())), strict=True):
        plan = plan_of(job, ranks)
        held, moved = memory(shapes, plan, "cpu"), communication(shapes, plan)
        case = f"{ranks} ranks, {ranks // job['shard']} × {job['shard']}, {name}"
        for quantity in HELD:
            yield row("ranks", case, quantity, found[quantity], getattr(held, quantity))
        for kind in SENT:
            own = getattr(moved, kind)
            yield row("ranks", case, f"{kind} sent", found["sent"].get(kind, 0), own.sent)
            yield row("ranks", case, f"{kind} collectives", found["collectives"].get(kind, 0), own.collectives)
        yield row("ranks", case, "peak", found["peak"], held.peak) | {
            "peaks": found["peaks"],
            "staged": 4 * shapes.root.numel,
        }


def kept(job: Row, compute: str, device: str) -> int:
    """Bytes of the storages that autograd keeps of the policy's pass, weights and token ids left out."""
    policy, _ = build(job)
    if compute == "bfloat16":
        policy.to(torch.bfloat16)
    policy.to(device)
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if x.is_floating_point() and storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(x)  # no address is given out twice
        return x

    casting = torch.autocast(device, torch.bfloat16) if compute == "autocast" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), casting:
        policy(rows(job, device))
    return sum(found.values())


def of_autograd(device: str) -> Iterator[Row]:
    """(b) Activations."""
    shapes = read_shapes(ModelSource(config=dict(LLAMA)))
    for compute in ("float32", "bfloat16", "autocast"):
        for name in ("plain", "checkpointing", "LoRA", "LoRA, checkpointing"):
            job = JOB | {"lora": 8 * ("LoRA" in name), "checkpointing": "checkpointing" in name}
            if compute == "autocast" and job["lora"]:
                continue
            plan = Plan(
                rows=job["rows"],
                length=job["length"],
                scored=job["scored"] / job["length"],
                compute=compute,  # type: ignore[arg-type]
                checkpointing=job["checkpointing"],
                lora=Lora(job["lora"]) if job["lora"] else None,
            )
            found = activations(shapes, plan)
            yield row("autograd", f"{compute}, {name}", "kept", kept(job, compute, device), found.layers + found.root)


def of_the_head(device: str) -> Iterator[Row]:
    """(c) What `linear_logp` holds at a time beside its inputs, gradients of the weight included."""
    n, d, v = HEADS[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = Shapes(read_shapes(ModelSource(config=dict(LLAMA))).root, (), d, 4 * d, d, d, 1, v, tied=False)
    hidden, weight = torch.randn(n, d, device=device, dtype=dtype), torch.randn(v, d, device=device, dtype=dtype)
    targets = torch.randint(0, v, (n,), device=device)
    for case, gradients in (("forward", ""), ("forward and backward", "hidden weight"), ("frozen", "hidden")):
        hidden.grad = weight.grad = None
        hidden.requires_grad_("hidden" in gradients)
        weight.requires_grad_("weight" in gradients)
        out: dict[str, int] = {}
        with allocated(device, out):
            found = linear_logp(hidden, weight, targets)
            if gradients:
                found.logp.sum().backward()
            del found
        compute = "bfloat16" if dtype == torch.bfloat16 else "float32"
        lora = Lora() if case == "frozen" else None
        held = head_workspace(shapes, Plan(rows=1, length=n, scored=1.0, compute=compute, lora=lora), device)  # type: ignore[arg-type]
        most = held.forward if case == "forward" else max(held.scoring, held.backward + held.weight_gradient)
        yield row("head", f"N {n}, d {d}, V {v}, {compute}, {case}", "peak", out["peak"], most)


def on_one_device(device: str) -> Iterator[Row]:
    """A whole step in float32, without FSDP."""
    shapes = read_shapes(ModelSource(config=dict(LLAMA)))
    for name in ("plain", "checkpointing", "LoRA, checkpointing"):
        job = JOB | {"shard": 1} | JOBS[name]
        predicted, found = memory(shapes, plan_of(job, 1), device).peak, measure(job, device)
        yield row("one device", name, "peak", found["peak"], predicted) | {"peaks": found["peaks"]}


def report(options: argparse.Namespace) -> Row:
    found = list(of_autograd(options.device)) + list(of_the_head(options.device)) + list(on_one_device(options.device))
    if options.device == "cpu":
        found += on_ranks(2, JOBS)
        found += on_ranks(
            4, {"plain": {}, "HSDP": {"shard": 2}, "HSDP, LoRA": {"shard": 2, **JOBS["LoRA, checkpointing"]}}
        )
    return {"benchmark": "scaling", "device_type": options.device, **environment(), "rows": found}


def wrong(found: Row) -> list[str]:
    """Rows of what is held and sent that are not equal to the byte, of peaks that are off by more than a quarter, of
    kept activations by more than a twentieth. `staged`: gloo's own copy of the largest unit that it reduces."""
    limits = {"peak": 0.25, "kept": 0.05}

    def fits(x: Row) -> bool:
        error, allowed = x["measured"] - x["predicted"], limits.get(x["quantity"], 0) * x["predicted"]
        return bool(-allowed <= error <= allowed + x.get("staged", 0))

    off = (x for x in found["rows"] if not fits(x))
    return [f"{x['part']}, {x['case']}: {x['quantity']} {x['measured']:,}, formula {x['predicted']:,}" for x in off]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--tables", action="store_true", help="write the tables of docs/scaling.md anew; measure nothing"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/scaling-DEVICE.json")
    options = parser.parse_args(arguments)
    options.out = options.out or ROOT / "benchmarks" / "results" / f"scaling-{options.device}.json"
    return options


def main() -> None:
    options = parse()
    if options.tables:
        write_tables()
        return
    torch.set_num_threads(1)
    found = report(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for x in found["rows"]:
        print(f"{x['part']:10}  {x['case']:44}  {x['quantity']:26} {x['measured']:>14,} {x['ratio']:.3f}")
    if off := wrong(found):
        raise SystemExit("\n".join(off))


if __name__ == "__main__":
    main()
