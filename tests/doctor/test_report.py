"""`doctor`: every judgement from made-up machines, the exit status, and one real run."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

import pytest
from rich.console import Console

from halos_pl import __version__
from halos_pl.__main__ import main
from halos_pl.doctor import report as doctor
from halos_pl.doctor.packages import Package

REPORT: dict[str, Any] = {
    "processor": {"model": "Abacus", "cores": 4, "usable_cores": 2.0, "threads": 2},
    "memory": {"total_mib": 8192, "available_mib": 4096},
    "accelerators": {"cuda": [], "mps": False, "built_for": "cpu", "nvidia_driver": False},
    "triton": {"version": "3.6", "target": None, "problem": "no driver", "interpret": False, "obstacle": "no GPU",
               "impl": None, "refusal": None},
    "measured": {
        "products": {"cpu": {"float32": 100.0, "bfloat16": 100.0}},
        "threads": {"1": {"small": 10.0, "large": 50.0}, "2": {"small": 10.0, "large": 100.0}},
        "linear_logp": {
            "cpu": {
                "tokens_per_second": 2000.0, "tokens": 1024, "vocabulary": 32768,
                "logits_not_held_mib": 128, "chunk_mib": 64,
            }
        },
    },
}  # fmt: skip
GPU = {"name": "Big", "memory_mib": 81920, "capability": "9.0", "bfloat16": True}


def verdicts(**changes: Any) -> list[doctor.Verdict]:
    """Of a machine on which all is well, but for these values, named `part__key`."""
    report = copy.deepcopy(REPORT)
    for key, value in changes.items():
        part, name = key.split("__")
        report[part][name] = value
    return list(doctor.judge_machine(report))


def test_a_machine_on_which_all_is_well() -> None:
    assert {x.mark for x in verdicts()} == {"ok", "note"}
    texts = " ".join(x.text for x in verdicts())
    assert "2 threads against one: small products 1× as fast, large ones 2× as fast; in use: 2" in texts
    assert "halos_kernels runs PyTorch operators over vocabulary chunks: no GPU" in texts


@pytest.mark.parametrize(
    ("changes", "text", "remedy"),
    [
        ({"processor__threads": 8}, "8 threads on 2 usable cores", "export OMP_NUM_THREADS=2"),
        (
            {"measured__threads": {"1": {"small": 10, "large": 50}, "2": {"small": 1, "large": 99}}},
            "small products 10.0× slower",
            "export OMP_NUM_THREADS=1 for small models, 2 for large ones",
        ),
        (
            {"measured__threads": {"1": {"small": 10, "large": 50}, "2": {"small": 1, "large": 40}}},
            "large ones 1.2× slower",
            "export OMP_NUM_THREADS=1",
        ),
        (
            {"measured__products": {"cpu": {"float32": 100, "bfloat16": 5}}},
            "cpu: bfloat16 products against float32: 20.0× slower",
            "leave --model.dtype float32 and --trainer.precision 32-true",
        ),
        (
            {"measured__products": {"mps": {"float32": 100, "bfloat16": None}}},
            "mps: bfloat16 products fail",
            "--model.dtype float32 --trainer.precision 32-true",
        ),
        ({"accelerators__nvidia_driver": True}, "this torch is built for the CPU", "has a CUDA build"),
        ({"accelerators__cuda": [GPU | {"bfloat16": False}]}, "Big has no bfloat16", "--trainer.precision 32-true"),
        ({"memory__available_mib": 300}, "only 300 MiB of memory", "--data.batch_size"),
        ({"triton__interpret": True}, "TRITON_INTERPRET is set", "unset TRITON_INTERPRET"),
    ],
)
def test_what_is_wrong_ends_in_a_remedy(changes: dict[str, Any], text: str, remedy: str) -> None:
    (wrong,) = [x for x in verdicts(**changes) if x.mark not in ("ok", "note")]
    assert wrong.mark == "warning"
    assert text in wrong.text
    assert wrong.remedy is not None
    assert remedy in wrong.remedy


def test_an_implementation_that_cannot_serve() -> None:
    (wrong,) = [x for x in verdicts(triton__impl="triton", triton__refusal="no way") if x.mark == "wrong"]
    assert (wrong.text, wrong.remedy) == ("every run would fail: no way", "unset HALOS_IMPL")
    assert "HALOS_IMPL=eager chooses" in " ".join(x.text for x in verdicts(triton__impl="eager"))


def test_a_driver_that_torch_does_not_see() -> None:
    (wrong,) = [x for x in verdicts(accelerators__nvidia_driver=True, accelerators__built_for="cuda") if x.remedy]
    assert "CUDA_VISIBLE_DEVICES" in str(wrong.remedy)


def test_fast_bfloat16_and_idle_cores_are_named() -> None:
    found = verdicts(measured__products={"cpu": {"float32": 100, "bfloat16": 450}}, processor__threads=1)
    texts = [x.text for x in found]
    assert any("4.5× as fast" in x and "--trainer.precision bf16-mixed" in x for x in texts)
    assert any("for large models export OMP_NUM_THREADS=2" in x for x in texts)
    assert all(x.remedy is None for x in found)


def test_one_core_has_no_threads_to_compare() -> None:
    found = verdicts(processor__usable_cores=1.0, measured__threads={"1": {"small": 1, "large": 1}})
    (wrong,) = [x for x in found if x.remedy]
    assert wrong.remedy == "export OMP_NUM_THREADS=1"


def test_packages_are_judged() -> None:
    old, good = Package("torch", "2.9", ">=2.11"), Package("rich", "15", ">=13")
    (wrong,) = doctor.judge_packages([old, good])
    assert wrong == doctor.Verdict("wrong", "torch 2.9 does not meet >=2.11", "pip install 'torch>=2.11'")
    (absent,) = doctor.judge_packages([Package("rich", None, ">=13"), good])
    assert absent.text == "rich is not installed"
    (fine,) = doctor.judge_packages([good])
    assert fine.mark == "ok"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No measuring."""
    monkeypatch.setattr("halos_pl.doctor.machine.measure", lambda: REPORT["measured"])


def screen(monkeypatch: pytest.MonkeyPatch, *asked: str) -> tuple[int, str]:
    """Status and screen, on a machine where the metadata ask for these."""
    monkeypatch.setattr(doctor, "requirements", lambda: (list(asked), ">=3.10"))
    out = io.StringIO()
    return doctor.main([], Console(file=out, width=160)), out.getvalue()


@pytest.mark.usefixtures("quick")
def test_the_status_tells_whether_packages_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = screen(monkeypatch, "torch>=2.11", 'no-such-thing>=1; extra == "lora"')
    assert status == 0
    assert f"✓ torch {version('torch')} (>=2.11)" in text
    assert "no-such-thing not installed (pip install 'halos-pl[lora]')" in text
    assert "✗" not in text
    assert "1,024 tokens × vocabulary of 32,768 = 128 MiB of logits; 64 MiB at a time" in text

    status, text = screen(monkeypatch, "torch>=99")
    assert status == 1
    assert f"✗ torch {version('torch')} (>=99)" in text
    assert f"✗ torch {version('torch')} does not meet >=99 → pip install 'torch>=99'" in text


def test_a_gpu_is_shown() -> None:
    report = copy.deepcopy(REPORT) | {"packages": [], "verdicts": []}
    report["accelerators"]["cuda"] = [GPU]
    report["measured"]["products"]["cuda:0"] = {"float32": 5e4, "bfloat16": None}
    report["measured"]["linear_logp"]["cuda:0"] = None
    out = io.StringIO()
    doctor.render(report, Console(file=out, width=160))
    assert "Big, 80.0 GiB, compute capability 9.0, bfloat16" in out.getvalue()
    assert "cuda:0: float32 5e+04, bfloat16 fails GFLOP/s" in out.getvalue()
    assert "cuda:0: fails" in out.getvalue()


def test_without_torch_it_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("halos_pl.doctor.machine")
    monkeypatch.setitem(sys.modules, "halos_pl.doctor.machine", None)
    status, text = screen(monkeypatch, "rich>=13")
    assert status == 1
    assert "torch cannot be imported" in text
    assert "→ pip install" in text


def test_an_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--jsn"]) == 2
    assert capsys.readouterr().err == "halos_pl: error: unrecognized arguments: --jsn\n"


def test_json_in_a_real_process() -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "halos_pl", "doctor", "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    assert time.perf_counter() - start < 30, "15 s on two idle cores"
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True
    by_name = {x["name"]: x["version"] for x in report["packages"]}
    assert by_name["halos-pl"] == __version__
    assert by_name["torch"] == version("torch")
    assert set(report) == {"packages", *REPORT, "verdicts", "ok"}
    assert report["measured"]["products"]["cpu"]["float32"] > 0
    assert set(report["measured"]["threads"]) >= {"1"}
    assert all(x["remedy"] for x in report["verdicts"] if x["mark"] in ("warning", "wrong"))
