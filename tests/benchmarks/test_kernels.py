"""The comparison of implementations runs, times nothing that is wrong, and says what it could not measure."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

FOUND = ("--peers", "naive", "ours", "--passes", "forward+backward", "--device", "cpu", "--quick")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def kernels(module: Callable[[str], Any]) -> Any:
    return module("kernels")


@pytest.fixture
def pretend(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An implementation of the given name is this function."""

    def replace(name: str, logp: Callable[..., Tensor], **options: Any) -> None:
        monkeypatch.setitem(kernels.PEERS, name, type(kernels.PEERS[name])(lambda: logp, **options))

    return replace


def right(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.log_softmax(hidden @ weight.t(), -1).gather(1, targets[:, None])[:, 0]


def raises(*inputs: Tensor) -> Tensor:
    raise RuntimeError("out of order\nand more")


def test_quick_measures_what_is_here_and_names_what_is_not(
    kernels: Any, module: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "deep" / "kernels.json", tmp_path / "kernels.png"
    names = ["naive", "ours", "ours-tiled", "torch", "liger", "cce"]
    drawn = ["--plot", str(plot)] if importlib.util.find_spec("matplotlib") else []
    argv = ["--quick", "--device", "cpu", "--peers", *names, "--out", str(out), *drawn]
    assert kernels.main(argv) == 0
    printed, report = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    assert report.keys() == {"benchmark", "device", "commit", "date", "versions", "settings", "rows"}
    assert report["device"].keys() == {"cpu", "threads"}
    assert report["versions"]["torch"] == torch.__version__
    assert module("kernel_report").table(report["rows"]) in printed
    assert {(x["pass"], x["implementation"]) for x in report["rows"]} == {
        (what, name) for what in ("forward", "forward+backward", "frozen") for name in ("torch.mm", *names)
    }
    for row in report["rows"]:
        assert (row["shape"], row["dtype"]) == ("96,64,3000", "float32")
        if row["implementation"] == "ours":
            assert row["status"] == "measured"
            assert row["ms"]["median"] >= row["ms"]["min"] > 0
            assert row["fraction"] > 0
            assert row["logratio_error"] < 1e-3
            gradients = {"forward": set(), "frozen": {"hidden_grad"}}.get(row["pass"], {"hidden_grad", "weight_grad"})
            assert row["errors"].keys() == {"logp"} | gradients
            if Path("/proc/self/clear_refs").exists():
                assert row["peak_mib"] > 0
        if row["implementation"] == "naive":
            assert row["times_naive"] == 1.0
        if row["implementation"] == "ours-tiled":
            assert row["status"] == "missing"
    for package, name in (("liger_kernel", "liger"), ("cut_cross_entropy", "cce")):
        if importlib.util.find_spec(package) is None:
            assert f"{name}: missing: not installed (No module named '{package}')" in printed
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    assert plot.exists() == bool(drawn)


def off(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return right(hidden, weight, targets) + 1e-4


def steep(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = right(hidden, weight, targets)
    return logp.detach() + 1.01 * (logp - logp.detach())


def nan(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return right(hidden, weight, targets) * torch.nan


@pytest.mark.parametrize(
    ("wrong", "told"),
    [(off, "logp error 1.0"), (steep, "hidden_grad error 1.0"), (nan, "nan"), (raises, "RuntimeError: out of order\n")],
)
def test_no_time_without_right_results(
    kernels: Any, pretend: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, wrong: Any, told: str
) -> None:
    pretend("ours", wrong)
    assert kernels.main([*FOUND, "--out", str(tmp_path / "out.json")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert told in captured.err
    assert not list(tmp_path.iterdir())


def test_ours_that_cannot_be_imported_is_an_error_not_an_absence(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        raise ImportError("broken")

    monkeypatch.setitem(kernels.PEERS, "ours", type(kernels.PEERS["ours"])(load))
    with pytest.raises(ImportError, match="broken"):
        kernels.main([*FOUND])


def one_gradient_for_all(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Each token's number is right, but its gradient is that of the sum, shared out."""
    logp = right(hidden, weight, targets)
    return logp.detach() + (logp.sum() - logp.sum().detach()) / len(targets)


def test_what_others_cannot_is_a_row_with_the_reason(kernels: Any, pretend: Any) -> None:
    pretend("trl", one_gradient_for_all)
    pretend("liger", raises)
    pretend("liger-sum", lambda *x: right(*x).sum(), total=True)
    pretend("cce", lambda *x: right(*x)[:, None])
    pretend("torch", lambda *x: right(*x) + 0.01)  # inexact, and that is its own affair
    names = ["naive", "ours", "torch", "trl", "liger", "liger-sum", "cce"]
    options = kernels.parse(["--quick", "--device", "cpu", "--peers", *names])
    rows = kernels.check(options, {name: kernels.load_peer(name, "cpu") for name in names})
    found = {key[2:]: row for key, row in rows.items()}
    assert all(found[what, "naive"]["status"] == "measured" for what in options.passes)
    assert "wrong gradient" in found["forward+backward", "trl"]["reason"]
    assert found["forward", "trl"]["status"] == "measured"
    assert found["frozen", "liger"] == {"status": "cannot", "reason": "RuntimeError: out of order"}
    assert found["forward", "liger-sum"]["reason"] == "gives the sum of all tokens only"
    assert found["forward+backward", "liger-sum"]["errors"]["weight_grad"] < 1e-5
    assert "not a number for each token" in found["forward", "cce"]["reason"]
    assert found["forward", "torch"]["errors"]["logp"] == pytest.approx(0.01, abs=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_trl_is_called_as_it_wants(kernels: Any) -> None:
    options = kernels.parse(["--quick", "--device", "cpu", "--peers", "trl"])
    rows = kernels.check(options, {"trl": kernels.load_peer("trl", "cpu")})
    assert [row["status"] for row in rows.values()] == ["measured"] * 3


def test_truth_is_autograd_in_float64(module: Callable[[str], Any]) -> None:
    problems, peers = module("kernel_problem"), module("kernel_peers")
    problem = problems.make_problem(problems.Shape(40, 16, 9000), torch.float64, "cpu", 3)
    exact = peers.Peer(lambda: right).run(right, problem, "forward+backward")
    truth = problems.truth64(problem)
    assert all(x < 1e-12 for x in problems.errors(truth, exact).values())
    assert len(truth.rows) == 40
    assert set(problem.targets.tolist()) < set(truth.columns.tolist())
    torch.testing.assert_close(problems.logp64(problem)[0], exact.logp, rtol=0, atol=1e-12)


def test_rounds_begin_with_another_implementation_each(kernels: Any) -> None:
    calls: list[str] = []
    work = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = kernels.interleave(work, 4, "cpu")
    assert "".join(calls) == "abc" + "abcbcacababc"
    assert {name: len(ms) for name, ms in samples.items()} == dict.fromkeys("abc", 4)


def row(name: str, times: float, mib: float | None) -> dict[str, Any]:
    memory = {} if mib is None else {"peak_mib": mib}
    return {"implementation": name, "times_naive": times} | memory


@pytest.mark.parametrize(
    ("times", "mib", "told"),
    [(1.1, 50.0, []), (1.2, 50.0, ["times_naive: 1.20"]), (1.0, 51.0, ["memory: 0.51"]), (1.0, None, ["memory could"])],
)
def test_gate_by_hand(kernels: Any, times: float, mib: float | None, told: list[str]) -> None:
    failures = kernels.gate([row("torch.mm", 0.2, None), row("naive", 1.0, 100.0), row("ours", times, mib)])
    assert [x.startswith(y) for x, y in zip(failures, told, strict=True)] == [True] * len(told)


def test_gate_has_its_own_shape_and_its_exit_code(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = kernels.parse(["--gate"])
    assert (list(map(str, options.shapes)), options.dtypes) == (["683,512,32000"], ["float32"])
    assert (options.passes, options.peers) == (["forward+backward"], ["naive", "ours"])
    assert (options.device, options.out) == ("cpu", None)

    def measure(options: Any, peers: Any, rows: dict[Any, Any]) -> None:
        (case,) = {key[:3] for key in rows}
        figures = {"ms": {"median": 1.0, "min": 1.0}, "fraction": 1.0}
        rows[(*case, "torch.mm")] = {"status": "measured", **figures}
        rows[(*case, "naive")] |= figures | {"times_naive": 1.0, "peak_mib": 10.0}
        rows[(*case, "ours")] |= figures | {"times_naive": 1.3, "peak_mib": 4.0}

    monkeypatch.setattr(kernels, "ONE_THIRD", kernels.TINY)
    monkeypatch.setattr(kernels, "measure", measure)
    for load in (0.0, 3.0):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert kernels.main(["--gate"]) == 1
        told = capsys.readouterr().err.splitlines()
        assert told[0] == "times_naive: 1.30, at most 1.1 was asked"
        assert ["busy machine" in line for line in told[1:]] == [True] * (load > 0)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--peers", "other"], "'naive'"),
        (["--shapes", "12,3"], "three positive integers such as 683,512,32000"),
        (["--shapes", "0,3,4"], "'0,3,4'"),
        (["--dtypes", "int8"], "bfloat16"),
        (["--passes", "sideways"], "frozen"),
        (["--repeats", "0"], "'0' is not an integer from 1 on"),
        (["--gate", "--peers", "ours"], "leave out --peers"),
        (["--gate", "--device", "cuda"], "--device c"),
    ],
)
def test_bad_arguments_are_named(kernels: Any, capsys: pytest.CaptureFixture[str], argv: list[str], told: str) -> None:
    with pytest.raises(SystemExit):
        kernels.parse(argv)
    assert told in capsys.readouterr().err


def test_small_runs_do_not_touch_the_results(kernels: Any) -> None:
    assert kernels.parse(["--quick"]).out is None
    assert kernels.parse(["--device", "cpu"]).out.name == "kernels-cpu.json"


def test_memory_sees_a_large_block(module: Callable[[str], Any]) -> None:
    memory = module("kernel_memory")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux only")
    memory.forget_peak()
    before = memory.resident("VmRSS")
    torch.ones(8 << 20)  # 32 MiB, freed at once
    assert 30 < (memory.resident("VmHWM") - before) / memory.MIB < 40
    memory.forget_peak()
    assert (memory.resident("VmHWM") - before) / memory.MIB < 8


@pytest.mark.gpu
def test_forced_strategies_on_a_gpu(kernels: Any, tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    names = ["naive", "ours", "ours-tiled", "ours-chunked", "ours-eager"]
    assert kernels.main(["--quick", "--device", "cuda", "--peers", *names, "--out", str(out)]) == 0
    assert all(x["status"] == "measured" for x in json.loads(out.read_text(encoding="utf-8"))["rows"])
