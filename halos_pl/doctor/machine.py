"""What this process may use of the machine, and how fast that is: cores, memory, accelerators, Triton, products.

All functions gather plain values that JSON can hold; `halos_pl.doctor` judges and shows them.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from halos_kernels import linear_logp
from halos_kernels.chunks import limits
from halos_kernels.dispatch import obstacle, use_triton

MIB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup")
SMALL, LARGE = 64, 1024  # sides of the square products that threads are compared on
TOKENS, WIDTH, VOCABULARY = 1024, 128, 32768  # of the measured `linear_logp`
_FAILURES = (RuntimeError, TypeError, AssertionError)  # no such device, kernel or dtype, or no memory
_UNBOUNDED = 1 << 60  # cgroup v1 writes "no limit" as a huge number of bytes


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Model and cores of the CPU: those of the machine, and those that this process may use."""
    names = [line.split(":", 1)[1].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    return {
        "model": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "usable_cores": usable_cores(),
        "threads": torch.get_num_threads(),
    }


def usable_cores(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """Cores that this process may run on: its affinity, or the CPU quota of its cgroups where that is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [float(allowed)]
    for folder in _cgroups("cpu", root, own):
        match _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"):
            case [quota, period] if quota.isdigit() and int(period):  # "max" and -1 are no quota
                quotas.append(int(quota) / int(period))
    return min(quotas)


def memory(
    root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup"), meminfo: Path = Path("/proc/meminfo")
) -> dict[str, int | None]:
    """Total and available memory in MiB, within the limit of the cgroups; None where the system does not tell."""
    known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in _lines(meminfo) if line.endswith("kB")}
    total, available = known.get("MemTotal"), known.get("MemAvailable")
    if total is None and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _cgroups("memory", root, own):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
        if total is not None and limit and limit[0].isdigit() and int(limit[0]) < min(total, _UNBOUNDED):
            total = int(limit[0])
            free = total - int(used[0]) if used else total
            available = free if available is None else min(available, free)
    return {
        "total_mib": None if total is None else total // MIB,
        "available_mib": None if available is None else available // MIB,
    }


def accelerators() -> dict[str, Any]:
    """CUDA devices, MPS, and whether there is a driver of NVIDIA's that this torch cannot use."""
    devices = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "name": facts.name,
                "memory_mib": facts.total_memory // MIB,
                "capability": f"{facts.major}.{facts.minor}",
                "bfloat16": facts.major >= 8 or torch.version.hip is not None,
            }
        )
    return {
        "cuda": devices,
        "mps": torch.backends.mps.is_available(),
        "built_for": "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu",
        "nvidia_driver": Path("/proc/driver/nvidia/version").is_file(),
    }


def triton() -> dict[str, Any]:
    """Version of Triton, the device it compiles for, both variables of the environment, and what the kernels say."""
    found: dict[str, Any] = {"version": None, "target": None, "problem": None}
    try:
        import triton

        found["version"] = triton.__version__
        target = triton.runtime.driver.active.get_current_target()
        found["target"] = f"{target.backend} {target.arch}"
    except Exception as error:  # a broken install fails in its own way
        found["problem"] = " ".join(str(error).split())
    found["interpret"] = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found["obstacle"] = obstacle(device)
    found["impl"], found["refusal"] = os.environ.get("HALOS_IMPL") or None, None
    try:
        use_triton("auto", device)
    except ValueError as error:
        found["refusal"] = str(error)
    return found


def measure() -> dict[str, Any]:
    """Products and `linear_logp` on each device, in a few seconds. Threads are left as they were."""
    every = max(1, math.ceil(usable_cores()))
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    devices += ["mps"] * torch.backends.mps.is_available()
    found: dict[str, Any] = {"products": {}, "linear_logp": {}, "threads": {}}
    for name in devices:
        found["products"][name] = {kind: gflops(LARGE, kind, name) for kind in ("float32", "bfloat16")}
        found["linear_logp"][name] = scoring_speed(name)
    for count in dict.fromkeys((1, every)):
        with _threads(count):
            found["threads"][str(count)] = {"small": gflops(SMALL), "large": gflops(LARGE)}
    return found


def gflops(side: int, dtype: str = "float32", device: str = "cpu", seconds: float = 0.25) -> float | None:
    """Billions of floating-point operations a second in a product of square matrices; None where it cannot be done.

    Args:
        side: of the matrices; at least 4096 on an accelerator, which smaller ones do not fill.
        dtype: of the matrices.
        device: where they are multiplied.
        seconds: to repeat it for.
    """
    try:
        if device != "cpu":
            side = max(side, 4096)
        a = torch.rand(side, side, device=device, dtype=getattr(torch, dtype))
        return 2 * side**3 / _duration(lambda: a @ a, device, seconds) / 1e9
    except _FAILURES:
        return None


def scoring_speed(device: str) -> dict[str, float | int] | None:
    """Tokens a second of `linear_logp`, forward and backward in float32, and the logits that it did not hold; None
    where it cannot be done."""

    def step() -> None:
        linear_logp(hidden, weight, targets).logp.sum().backward()

    try:
        hidden = torch.rand(TOKENS, WIDTH, device=device, requires_grad=True)
        weight = torch.rand(VOCABULARY, WIDTH, device=device, requires_grad=True)
        targets = torch.arange(TOKENS, device=device)
        seconds = _duration(step, device, 0.5)
    except Exception:  # also a broken Triton, which torch imports for operators of one's own
        return None
    logits = TOKENS * VOCABULARY * 4
    return {
        "tokens_per_second": TOKENS / seconds,
        "tokens": TOKENS,
        "vocabulary": VOCABULARY,
        "logits_not_held_mib": logits // MIB,
        "chunk_mib": min((limit := limits(weight.device)).workspace, logits // limit.parts) // MIB,
    }


def _duration(work: Callable[[], object], device: str, seconds: float) -> float:
    """Mean seconds of a call, over as many calls as fit (at least one, after one to warm up).

    The mean and not the median: threads that wait for a core stall now and then, and for long.
    """
    work()
    _wait(device)
    calls, total = 0, 0.0
    while not calls or total < seconds:
        start = time.perf_counter()
        work()
        _wait(device)
        calls, total = calls + 1, total + time.perf_counter() - start
    return total / calls


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cgroups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """Folders of the cgroups that this process is in, from its own up to the root: v2, and v1 of a controller."""
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        here = top / path.lstrip("/")
        yield from (x for x in (here, *here.parents) if x == top or top in x.parents)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
