"""Compile every kernel for every GPU that ships with tiles, without a GPU, and hold it to a budget.

    python -m benchmarks.aot [--targets sm_90 …] [--kernels statistics …] [--json FILE]

prints registers, bytes spilled (registers on AMD) and shared memory of each, and exits 1 if one is over budget or lacks
the instructions without which a matrix product is slow.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from halos_kernels.dispatch import DESCRIPTORS, tile
from rich.console import Console
from rich.table import Table

from benchmarks.kernel_report import positive, writable

# Triton is imported in the processes that compile, and nowhere else: it decides then whether it interprets.

KERNELS = {
    "statistics": "tiled.statistics_kernel",
    "dlogits": "tiled.dlogits_kernel",
    "rescale": "tiled.rescale_kernel",
    "fold": "chunked.fold_kernel",
    "chunk_dlogits": "chunked.dlogits_kernel",
    "merge": "merge.merge_kernel",
    "sums": "sequences.sums_kernel",
}
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # what one program may take
SPILLED = {  # bytes (AMD: registers) allowed, where not 0: target, kernel, options. Triton 3.6 and 3.9 spill in turn.
    # The frozen forward keeps a tile of 128 × 256 sums and writes it out: once a tile, not in the loop over the width.
    ("sm_90", "statistics", "store"): 96,  # 0 on 3.6, 88 on 3.9
    ("sm_90", "statistics", "bias, store"): 96,  # 96 and 72
    ("sm_100", "statistics", "bias, store"): 48,  # 48 and 0
    ("gfx942", "statistics", "bias, store"): 8,  # 0 and 7
    ("sm_80", "statistics", "all, store"): 16,  # 8 and 0
    ("gfx942", "statistics", "bias, entropy"): 4,  # 0 and 3
}
INSTRUCTIONS = {  # of a matrix product: the matrix unit, and copies that run beside it
    "sm_80": ("HMMA", "LDGSTS"),
    "sm_90": ("HGMMA", "UTMALDG"),
    "sm_100": ("UTCHMMA", "UTMALDG"),
    "gfx942": ("v_mfma",),
}
OPERANDS = ("H", "W", "H0", "W0", "H1", "W1")
HALF = (*OPERANDS, "BIAS", "BIAS0", "BIAS1", "E", "DU")  # bfloat16; other pointers float32
FLOATS = ("inner", "outer", "slope")

PLAIN = {"HAS_BIAS": False, "SOFTCAP": False, "ENTROPY": False}
BIAS = {**PLAIN, "HAS_BIAS": True}
CAPPED = {**BIAS, "SOFTCAP": True}
FULL = {**CAPPED, "ENTROPY": True}
ALIGNED, RAGGED = {"D": 4096}, {"D": 4090, "DESCRIPTORS": False}  # rows of whole 16 bytes; rows read by pointers
ONE = {**ALIGNED, "HEADS": 1, "STORE": False}
VARIANTS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (  # kernel, options, its tile in the table, constants
    ("statistics", "plain", "forward", {**ONE, **PLAIN}),
    ("statistics", "two heads", "forward", {**ONE, **PLAIN, "HEADS": 2}),
    ("statistics", "bias, softcap", "forward_capped", {**ONE, **CAPPED}),
    ("statistics", "store", "forward", {**ONE, **PLAIN, "STORE": True}),
    ("statistics", "bias, store", "forward", {**ONE, **BIAS, "STORE": True}),
    ("statistics", "all, store", "forward_capped", {**ONE, **CAPPED, "STORE": True}),
    ("statistics", "bias, entropy", "forward", {**ONE, **BIAS, "ENTROPY": True}),
    ("statistics", "all, entropy", "forward_capped", {**ONE, **FULL}),
    ("statistics", "pointers", "forward", {**ONE, **PLAIN, **RAGGED}),
    ("dlogits", "plain", "dlogits", {**ALIGNED, **PLAIN}),
    ("dlogits", "bias", "dlogits", {**ALIGNED, **BIAS}),
    ("dlogits", "all, entropy", "dlogits_full", {**ALIGNED, **FULL}),
    ("dlogits", "pointers", "dlogits", {**PLAIN, **RAGGED}),
    ("rescale", "", "rescale", {}),
    ("fold", "plain", "fold", {**PLAIN, "STORE": False}),
    ("fold", "all, entropy", "fold", {**FULL, "STORE": False}),
    ("fold", "store", "fold", {**CAPPED, "STORE": True}),
    ("chunk_dlogits", "plain", "chunk_dlogits", PLAIN),
    ("chunk_dlogits", "all, entropy", "chunk_dlogits", FULL),
    ("sums", "", "sums", {"HAS_REF": True}),
    ("merge", "", "merge", {"ENTROPY": True}),
)


@dataclass(frozen=True)
class Job:
    """One kernel with one set of options, for one target."""

    target: str
    kernel: str
    variant: str
    constants: dict[str, Any]
    options: dict[str, int]  # warps and stages
    allowed: dict[str, int]  # bytes spilled and shared (spilled: registers on AMD)


@dataclass
class Result:
    """What the compiler made of it."""

    job: Job
    seconds: float = 0.0
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def over(self) -> list[str]:
        """What is over budget, or missing."""
        if self.error:
            return [self.error]
        used = {name: int(getattr(self, name)) for name in self.job.allowed}
        found = [f"{name} {used[name]} > {most}" for name, most in self.job.allowed.items() if used[name] > most]
        return found + [f"no {name}" for name in self._expected() if not self.instructions.get(name)]

    def _expected(self) -> list[str]:
        if self.job.kernel not in ("statistics", "dlogits"):
            return []
        copied = self.job.constants["DESCRIPTORS"]
        return [name for name in INSTRUCTIONS[self.job.target] if copied or name != "UTMALDG"]


def jobs(targets: list[str], kernels: list[str], shared_kib: int | None = None) -> Iterator[Job]:
    """Every variant with the tile that the table gives each target."""
    for target in targets:
        for kernel, variant, name, constants in VARIANTS:
            if kernel not in kernels or (variant == "pointers" and target not in DESCRIPTORS):
                continue
            constants = {"INTERPRETED": False, "DESCRIPTORS": target in DESCRIPTORS, **constants}
            sizes = tile(name, target)
            if kernel == "rescale":  # over the columns of the forward's tile
                sizes["BLOCK_N"] = tile("forward", target)["BLOCK_N"]
            options: dict[str, int] = {x: sizes.pop(x) for x in ("num_warps", "num_stages") if x in sizes}
            allowed = {
                "spilled": SPILLED.get((target, kernel, variant), 0),
                "shared": (SHARED_KIB[target] if shared_kib is None else shared_kib) << 10,
            }
            yield Job(target, kernel, variant, {**constants, **sizes}, options, allowed)


def compile_job(job: Job) -> Result:
    """Compile ahead of time, and read what the assembler reports."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = KERNELS[job.kernel].partition(".")
    kernel = getattr(importlib.import_module(f"halos_kernels.jit.{module}"), name)
    constants = {key: value for key, value in job.constants.items() if key in kernel.arg_names}
    signature = {name: _type(name, job) for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if _is_aligned(name, signature[name])]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    nvidia = job.target.startswith("sm_")
    target = GPUTarget("cuda", int(job.target[3:]), 32) if nvidia else GPUTarget("hip", job.target, 64)
    start = time.perf_counter()
    try:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=target, options=job.options)
        result = Result(job, time.perf_counter() - start, shared=compiled.metadata.shared)
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        return (
            _read_cubin(result, compiled.asm["cubin"], tools) if nvidia else _read_amd(result, compiled.asm["amdgcn"])
        )
    except Exception as error:  # one that fails is one row of the table
        return Result(job, error=f"{type(error).__name__}: {str(error)[:200]}")


def _type(name: str, job: Job) -> str:
    if name in job.constants:
        return "constexpr"
    if name in FLOATS:
        return "fp32"
    if name in OPERANDS and job.constants["DESCRIPTORS"]:
        rows = job.constants["BLOCK_M" if name.startswith("H") else "BLOCK_N"]
        return f"tensordesc<bf16[{rows}, {job.constants['BLOCK_D']}]>"
    if not name.isupper() or name in ("N", "V", "S"):
        return "i32"
    return "*i64" if name in ("TARGETS", "CU") else "*bf16" if name in HALF else "*fp32"


def _is_aligned(name: str, kind: str) -> bool:
    """What the JIT's specialisation finds for aligned pointers and for multiples of 16."""
    return kind.startswith("*") or (kind == "i32" and name.startswith(("stride", "n_columns")))


def _read_cubin(result: Result, cubin: bytes, tools: Path) -> Result:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([tools / "cuobjdump", "-res-usage", file.name]).stdout
        code = run([tools / "cuobjdump", "-sass", file.name]).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if not found:
        raise ValueError(f"no resource usage in {usage[:100]!r}")
    result.registers, result.spilled = int(found[1]), int(found[2])
    names = {name for names in INSTRUCTIONS.values() for name in names}
    words = re.findall(r"\b[A-Z][A-Z0-9]+\b", code)
    result.instructions = {name: words.count(name) for name in sorted(names) if name in words}
    return result


def _read_amd(result: Result, code: str) -> Result:
    def value(key: str) -> int:
        found = re.search(rf"\.{key}:?\s+(\d+)", code)
        if not found:
            raise ValueError(f"no {key} in the assembly")
        return int(found[1])

    result.registers, result.spilled = value("vgpr_count"), value("vgpr_spill_count")
    result.instructions = {"v_mfma": code.count("v_mfma")}
    return result


@contextmanager
def _environment() -> Iterator[None]:
    """What the child processes inherit: no interpreter, and an empty cache, so that everything is compiled."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def show(results: list[Result]) -> None:
    numbers = ("registers", "spilled", "shared KiB", "seconds")
    rows = Table(title=f"Triton {version('triton')}")
    for heading in ("target", "kernel", "options", *numbers, ""):
        rows.add_column(heading, justify="right" if heading in numbers else "left")
    for x in results:
        values = (str(x.registers), str(x.spilled), f"{x.shared / 1024:.0f}", f"{x.seconds:.1f}")
        rows.add_row(x.job.target, x.job.kernel, x.job.variant, *values, "; ".join(x.over) or "ok")
    Console(width=None if sys.stdout.isatty() else 140).print(rows)
    over = [f"{x.job.target} {x.job.kernel} {x.job.variant}".strip() for x in results if x.over]
    print(f"{len(results)} kernels, over budget: {', '.join(over) or 'none'}")


def main(argv: list[str] | None = None) -> int:
    known = list(SHARED_KIB)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot",
        description="Compile every kernel ahead of time, without a GPU. Exit code 1: one spills, takes more shared "
        "memory than the target has, lacks matrix or asynchronous copy instructions, or does not compile.",
    )
    parser.add_argument("--targets", nargs="+", choices=known, default=known, help="default: all of tuned.json")
    parser.add_argument("--kernels", nargs="+", choices=sorted(KERNELS), default=list(KERNELS), help="default: all")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument(
        "--shared",
        type=positive,
        metavar="KIB",
        help="allow a program this much shared memory, not what the target has",
    )
    parser.add_argument("--json", type=writable, metavar="FILE", help="also write the results there")
    args = parser.parse_args(argv)
    wanted = list(jobs(args.targets, args.kernels, args.shared))
    with _environment(), ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(compile_job, wanted))
    show(results)
    if args.json:
        rows = [asdict(x) | {"over": x.over} for x in results]
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(x.over for x in results))


if __name__ == "__main__":
    sys.exit(main())
