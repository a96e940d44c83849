"""The ahead-of-time compile check, in processes of its own: this one may run Triton's interpreter."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "halos_kernels"


@pytest.fixture
def aot(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.aot")


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", *argv]
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=240)


def test_a_target_within_its_budgets(tmp_path: Path) -> None:
    """One target whose code is a cubin, one whose is assembly; the caller's interpreter and cache change nothing."""
    out = tmp_path / "aot.json"
    done = run(
        *("--targets", "sm_80", "gfx942", "--kernels", "dlogits", "merge", "--json", str(out)),
        TRITON_INTERPRET="1",
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(word in done.stdout for word in ("Triton", "registers", "spilled", "shared KiB", "all, entropy", "ok"))
    assert "8 kernels, over budget: none" in done.stdout
    assert not (tmp_path / "cache").exists(), "what was compiled before would be read, not compiled"
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert {(x["job"]["target"], x["job"]["kernel"]) for x in rows} == {
        (target, kernel) for target in ("sm_80", "gfx942") for kernel in ("dlogits", "merge")
    }
    for x in rows:
        assert x["registers"] > 0
        assert (x["spilled"], x["over"], x["error"]) == (0, [], "")
        assert x["seconds"] > 0.01
        assert x["shared"] > 0 or x["job"]["kernel"] != "dlogits"


def test_over_budget_is_an_exit_code_and_a_name(tmp_path: Path) -> None:
    out = tmp_path / "aot.json"
    done = run("--targets", "sm_90", "--kernels", "rescale", "fold", "--shared", "1", "--json", str(out))
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("4 kernels, over budget: ")
    assert "sm_90 fold all, entropy" in last
    assert "rescale" not in last
    rows = {(x["job"]["kernel"], x["job"]["variant"]): x for x in json.loads(out.read_text(encoding="utf-8"))}
    row = rows["fold", "all, entropy"]
    assert row["over"] == [f"shared {row['shared']} > 1024"]
    assert rows["rescale", ""]["over"] == []


def test_what_counts_as_over(aot: Any) -> None:
    job, *_ = aot.jobs(["sm_90"], ["statistics"])
    fine = {"HGMMA": 4, "UTMALDG": 2}
    assert job.allowed == {"spilled": 0, "shared": 227 << 10}
    assert aot.Result(job, instructions=fine).over == []
    assert aot.Result(job, instructions=fine, spilled=8).over == ["spilled 8 > 0"]
    assert aot.Result(job, instructions=fine, shared=(227 << 10) + 1).over == ["shared 232449 > 232448"]
    assert aot.Result(job, instructions={"HGMMA": 4}).over == ["no UTMALDG"]
    assert aot.Result(job, error="CompilationError: no").over == ["CompilationError: no"]
    pointers = next(x for x in aot.jobs(["sm_90"], ["dlogits"]) if x.variant == "pointers")
    assert aot.Result(pointers, instructions={"HGMMA": 4}).over == [], "rows read by pointers need no descriptor"


def test_a_kernel_that_does_not_compile_is_a_row(tmp_path: Path) -> None:
    script = (
        "from dataclasses import replace\n"
        "from benchmarks import aot\n"
        "job, *_ = aot.jobs(['sm_80'], ['merge'])\n"
        "result = aot.compile_job(replace(job, constants=job.constants | {'BLOCK': 100}))\n"
        "print(result.over[0])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Error" in done.stdout


def test_the_allowances_name_what_is_compiled(aot: Any) -> None:
    targets = sorted(aot.SHARED_KIB)
    known = {(x.target, x.kernel, x.variant) for x in aot.jobs(targets, list(aot.KERNELS))}
    assert set(aot.SPILLED) <= known
    assert all(0 < most <= 128 for most in aot.SPILLED.values())


def trees(pattern: str) -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(PACKAGE.glob(pattern)):
        yield path.stem, ast.parse(path.read_text(encoding="utf-8"))


def launched() -> set[str]:
    """module.function of every `function[grid](…)` in the host code."""
    found = set()
    for _, tree in trees("*.py"):
        origin = {
            alias.asname or alias.name: f"{node.module.rpartition('.')[2]}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module and ".jit." in node.module
            for alias in node.names
        }
        calls = (x.func for x in ast.walk(tree) if isinstance(x, ast.Call) and isinstance(x.func, ast.Subscript))
        found |= {origin[x.value.id] for x in calls if isinstance(x.value, ast.Name) and x.value.id in origin}
    return found


def test_every_kernel_is_compiled(aot: Any) -> None:
    assert launched() == set(aot.KERNELS.values())
    assert {kernel for kernel, *_ in aot.VARIANTS} == set(aot.KERNELS)
    called = {
        x.func.id for _, tree in trees("jit/*.py") for x in ast.walk(tree)
        if isinstance(x, ast.Call) and isinstance(x.func, ast.Name)
    }  # fmt: skip
    for module, tree in trees("jit/*.py"):
        for function in (x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)):
            name = f"{module}.{function.name}"
            assert name in aot.KERNELS.values() or function.name in called, f"{name} is neither launched nor called"


def test_every_target_has_every_tile_that_the_host_code_asks_for(aot: Any) -> None:
    asked = {
        word.value
        for _, tree in trees("*.py")
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("tile", "_tile")
        for word in ast.walk(call.args[0])
        if isinstance(word, ast.Constant) and isinstance(word.value, str)
    }
    assert {"forward", "forward_capped", "dlogits", "dlogits_full", "rescale", "fold"} <= asked
    own = json.loads((PACKAGE / "tuned.json").read_text(encoding="utf-8"))["tiles"]
    assert set(own) == {*aot.SHARED_KIB, "any", "interpreter"}
    assert set(aot.SHARED_KIB) == set(aot.INSTRUCTIONS)
    for target in aot.SHARED_KIB:
        assert set(own[target]) | set(own["any"]) == asked == set(own["interpreter"]), target
        for name in asked:
            sizes = {key for key in aot.tile(name, target) if key not in ("num_warps", "num_stages")}
            assert sizes == set(own["interpreter"][name]), f"{target} {name}"
    assert {name for _, _, name, _ in aot.VARIANTS} == asked


def test_importing_it_changes_nothing(aot: Any) -> None:
    script = "import os, sys\nbefore = dict(os.environ)\nimport benchmarks.aot\nassert dict(os.environ) == before\n"
    script += "assert 'triton' not in sys.modules\n"
    script += "with benchmarks.aot._environment():\n    assert 'TRITON_INTERPRET' not in os.environ\n"
    script += "assert dict(os.environ) == before\n"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
