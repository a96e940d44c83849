"""Which implementation serves a call, and what is said about it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from halos_kernels import chunked, dispatch, eager, linear_logp, tiled
from halos_kernels.inputs import Inputs, Transform


def inputs(n=4, v=5, d=3, dtype=torch.float32, weight_dtype=None):
    weight = torch.zeros(v, d, dtype=weight_dtype or dtype)
    return Inputs(torch.zeros(n, d, dtype=dtype), weight, None, torch.zeros(n, dtype=torch.long), Transform(), n)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True)


CALL = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
from halos_kernels import linear_logp
x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
for impl in {impls}:
    linear_logp(x, x, y, impl=impl)
"""


def test_eager_is_the_default_on_the_cpu_and_says_so_once():
    done = run(CALL.format(impls=["auto", "auto", "eager"]))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "halos_kernels: impl='auto' takes eager (no GPU is in use (on the CPU Triton needs its interpreter: "
        "TRITON_INTERPRET=1 from the start))"
    ]
    done = run(CALL.format(impls=["auto"]), TRITON_INTERPRET="1")
    assert done.stderr.splitlines() == [
        "halos_kernels: impl='auto' takes eager (in the interpreter Triton is slow: only when asked for)"
    ]


def test_the_environment_stands_for_auto(monkeypatch):
    if not dispatch.interpreting():
        pytest.skip("in the interpreter")
    monkeypatch.setenv("HALOS_IMPL", "triton")
    assert dispatch.implementation("auto", inputs()) is tiled
    assert dispatch.implementation("eager", inputs()) is eager
    monkeypatch.setenv("HALOS_IMPL", "eager")
    assert dispatch.implementation("auto", inputs()) is eager
    assert dispatch.implementation("triton", inputs()) is tiled
    monkeypatch.setenv("HALOS_IMPL", "triton")
    with pytest.raises(ValueError, match="HALOS_IMPL='triton' cannot serve this call: float64"):
        dispatch.implementation("auto", inputs(dtype=torch.float64))
    monkeypatch.setenv("HALOS_IMPL", "cuda")
    with pytest.raises(ValueError, match="HALOS_IMPL must be one of 'auto', 'triton', 'eager', got 'cuda'"):
        dispatch.implementation("auto", inputs())


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_triton_without_a_device_or_without_triton_is_refused():
    done = run(CALL.format(impls=["triton"]))
    assert (
        "ValueError: impl='triton' cannot serve this call: no GPU is in use (on the CPU Triton needs its interpreter"
        in done.stderr
    )
    absent = "import sys; sys.modules['triton'] = None\n"
    done = run(absent + CALL.format(impls=["eager", "auto"]))
    assert done.returncode == 0, done.stderr
    done = run(absent + CALL.format(impls=["triton"]), TRITON_INTERPRET="1")
    assert "ValueError: impl='triton' cannot serve this call: Triton cannot be imported" in done.stderr


def test_float64_is_eager_only():
    assert dispatch.implementation("auto", inputs(dtype=torch.float64)) is eager
    with pytest.raises(ValueError, match=r"impl='triton' cannot serve this call: float64"):
        dispatch.implementation("triton", inputs(dtype=torch.float64))
    assert dispatch.obstacle(torch.device("mps")) == "there are no kernels for mps"


def test_a_forced_strategy_holds_within_its_context():
    if not dispatch.interpreting():
        pytest.skip("in the interpreter")
    with dispatch.forced("chunked"):
        assert dispatch.implementation("triton", inputs()) is chunked
        with dispatch.forced("tiled"):
            assert dispatch.implementation("triton", inputs()) is tiled
            with pytest.raises(ValueError, match="the tiled strategy needs"):
                dispatch.implementation("triton", inputs(weight_dtype=torch.bfloat16))
        assert dispatch.implementation("triton", inputs()) is chunked
        assert dispatch.implementation("triton", inputs(n=0)) is eager
    with pytest.raises(ValueError, match="strategy must be one of tiled, chunked, got 'both'"), dispatch.forced("both"):
        pass
    assert dispatch.implementation("triton", inputs(weight_dtype=torch.bfloat16)) is chunked


def on_meta(n, v, d, dtype):
    hidden, weight, targets = (torch.empty(s, device="meta", dtype=dtype) for s in ((n, d), (v, d), (n,)))
    return Inputs(hidden, weight, None, targets, Transform(), len(targets))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_the_table_serves_every_call(arch, monkeypatch):
    monkeypatch.setattr(Inputs, "operand", property(lambda self: self.hidden.dtype))  # as on a GPU
    expected = {(3071, torch.bfloat16): "tiled", (3072, torch.bfloat16): "chunked", (896, torch.float32): "chunked"}
    for (d, dtype), name in expected.items():
        for n, v in ((1, 17), (8192, 151936)):
            assert dispatch.strategy(arch, on_meta(n, v, d, dtype)) == name


def test_every_gpu_has_every_tile():
    kernels = ("forward", "forward_capped", "dlogits", "dlogits_full")
    others = ("rescale", "fold", "chunk_dlogits", "sums", "merge")
    assert dispatch.tile("forward", "sm_75") == dispatch.tile("forward", "sm_120") == dispatch.tile("forward", "sm_80")
    assert dispatch.tile("forward", "gfx950") == dispatch.tile("forward", "gfx942")
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter"):
        assert all("BLOCK_D" in dispatch.tile(kernel, arch) for kernel in kernels)
        assert all(dispatch.tile(kernel, arch) for kernel in others)
    dispatch.tile("forward", "sm_90").clear()
    assert dispatch.tile("forward", "sm_90"), "a copy, not the table"


def test_an_old_gpu_takes_eager(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_75")
    reason = "the kernels need compute capability 8.0, this GPU has 7.5"
    assert dispatch.obstacle(torch.device("cuda")) == reason
    assert not dispatch.use_triton("auto", torch.device("cuda"))


def test_one_path_is_told_once(caplog):
    dispatch._tell.cache_clear()
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    with caplog.at_level(logging.INFO, "halos_kernels"):
        linear_logp(x, x, y)
        linear_logp(x, x, y)
    assert len(caplog.records) == 1
