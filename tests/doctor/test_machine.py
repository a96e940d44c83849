"""What may be used of a machine, read from files as Linux writes them, and the measurements."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from halos_kernels import dispatch, linear_logp

from halos_pl.doctor import machine

GIB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cgroup tree of a process that may run on 8 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "own").write_text("0::/a/b\n")
    (tmp_path / "meminfo").write_text(f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {32 * GIB // 1024} kB\nX: 3\n")
    return tmp_path


def write(root: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/a/b", {}, 8),
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, 8),
        ("0::/a/b", {"a/b/cpu.max": "250000 100000"}, 2.5),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "900000 100000"}, 8),
        ("0::/gone", {"cpu.max": "150000 100000"}, 1.5),
        ("3:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": 50000, "cpu/x/cpu.cfs_period_us": 100000}, 0.5),
        ("3:cpu:/x", {"cpu/x/cpu.cfs_quota_us": -1, "cpu/x/cpu.cfs_period_us": 100000}, 8),
        ("4:cpuset:/x", {"cpu/x/cpu.cfs_quota_us": 50000, "cpu/x/cpu.cfs_period_us": 100000}, 8),
    ],
)
def test_usable_cores(own: str, files: dict[str, object], cores: float, system: Path) -> None:
    (system / "own").write_text(f"{own}\n")
    write(system / "cgroup", files)
    assert machine.usable_cores(system / "cgroup", system / "own") == cores


@pytest.mark.parametrize(
    ("own", "files", "total", "available"),
    [
        ("0::/a", {}, 64, 32),
        ("0::/a", {"a/memory.max": "max"}, 64, 32),
        ("0::/a", {"a/memory.max": 16 * GIB, "a/memory.current": 4 * GIB}, 16, 12),
        ("0::/a", {"a/memory.max": 48 * GIB, "a/memory.current": 4 * GIB}, 48, 32),
        ("5:memory:/", {"memory/memory.limit_in_bytes": 9223372036854771712}, 64, 32),
        ("5:memory:/", {"memory/memory.limit_in_bytes": 8 * GIB, "memory/memory.usage_in_bytes": 7 * GIB}, 8, 1),
    ],
)
def test_memory(own: str, files: dict[str, object], total: int, available: int, system: Path) -> None:
    (system / "own").write_text(f"{own}\n")
    write(system / "cgroup", files)
    found = machine.memory(system / "cgroup", system / "own", system / "meminfo")
    assert found == {"total_mib": total * 1024, "available_mib": available * 1024}


def test_a_system_without_these_files(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    assert machine.usable_cores(nothing, nothing) >= 1
    assert machine.memory(nothing, nothing, nothing)["available_mib"] is None
    assert machine.processor(nothing)["model"]


def test_the_processor_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("vendor_id: X\nmodel name\t: Abacus: 7\nmodel name\t: Abacus: 7\n")
    found = machine.processor(tmp_path / "cpuinfo")
    assert found["model"] == "Abacus: 7"
    assert found["threads"] == torch.get_num_threads()


def test_devices_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.accelerators()
    assert len(found["cuda"]) == torch.cuda.device_count()
    assert found["mps"] == torch.backends.mps.is_available()

    class Old:
        name, total_memory, major, minor = "Old", 2 * GIB, 7, 5

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Old)
    expected = {"name": "Old", "memory_mib": 2048, "capability": "7.5", "bfloat16": False}
    assert machine.accelerators()["cuda"] == [expected]


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False)])
def test_triton(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    found = machine.triton()
    assert found["interpret"] is expected
    if torch.cuda.is_available():
        assert found["target"]
    else:
        assert found["target"] is None
        assert found["problem"]


def test_why_the_kernels_do_not_run_is_asked_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, targets = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="impl='triton' cannot serve this call") as caught:
            linear_logp(hidden, hidden, targets, impl="triton")
        assert str(caught.value).endswith(machine.triton()["obstacle"])
    monkeypatch.setenv("HALOS_IMPL", "fast")
    assert machine.triton()["refusal"].startswith("HALOS_IMPL must be one of")
    monkeypatch.setattr(dispatch, "_import_error", lambda: "Triton cannot be imported (no such thing)")
    assert machine.triton()["obstacle"] == "Triton cannot be imported (no such thing)"


def test_measurements() -> None:
    before = torch.get_num_threads()
    speed = machine.gflops(256, seconds=0.02)
    assert speed is not None
    assert 0.01 < speed < 1e5
    with machine._threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
    assert machine.gflops(64, device="cuda:99") is None


def test_the_mean_duration_counts_every_call() -> None:
    calls = []
    seconds = machine._duration(lambda: calls.append(0), "cpu", 0.01)
    assert len(calls) > 2
    assert 0 < seconds < 0.01


def test_the_logits_that_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.scoring_speed("cpu")
    assert found is not None
    assert found["tokens_per_second"] > 0
    assert found["logits_not_held_mib"] * 2**20 == machine.TOKENS * machine.VOCABULARY * 4
    assert found["chunk_mib"] * 2**20 <= machine.limits(torch.device("cpu")).workspace
    assert machine.scoring_speed("cuda:99") is None
