"""What only a GPU can show beside the numbers: memory, waits for the device, the same bits, device-side assertions."""

from __future__ import annotations

import gc
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from halos_kernels import Head, LogpOut, dispatch, linear_logp, linear_logp_multi, seq_logratio
from torch import Tensor

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
WAYS = ("tiled", "chunked", "eager")
N, V, D = 8192, 151936, 4096
QUARTER = N * V / 4 * 2 / 2**20  # MiB of a quarter of the logits in half precision


@contextmanager
def using(way: str) -> Iterator[str]:
    """The value of `impl` with which that way is taken."""
    if way == "eager":
        yield "eager"
    else:
        with dispatch.forced(way):
            yield "triton"


def make(n: int, v: int, d: int, spread: float = 2.0, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.empty(n, d, dtype=dtype, device=DEVICE).normal_(0, 1, generator=g)
    weight = torch.empty(v, d, dtype=dtype, device=DEVICE).normal_(0, spread / math.sqrt(d), generator=g)
    return hidden, weight, torch.randint(v, (n,), generator=g, device=DEVICE)


def extra_mib(call: Callable[[], object]) -> float:
    """What a call allocates at most above what was there. An earlier one leaves the libraries' workspaces behind."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    found = (torch.cuda.max_memory_allocated() - before) / 2**20
    del kept
    return found


@pytest.mark.parametrize(
    ("way", "d", "most"),  # MiB: forward; frozen; trained, with a weight gradient of 1187 (594)
    [
        ("tiled", D, (8, 320, 1740)),
        ("tiled", D // 2, (8, 320, 1147)),
        ("chunked", D, (264, 320, 1740)),
        ("chunked", D // 2, (264, 320, 1147)),
        ("eager", D, (QUARTER, QUARTER, 1187 + QUARTER)),
    ],
)
def test_memory(way: str, d: int, most: tuple[float, float, float]) -> None:
    hidden, weight, targets = make(N, V, d)
    up = torch.linspace(-1, 2, N, device=DEVICE)

    def forward() -> LogpOut:
        with torch.no_grad():
            return linear_logp(hidden, weight, targets, impl=impl)

    def both(frozen: bool) -> tuple[Tensor, ...]:
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
        (linear_logp(h, w, targets, impl=impl).logp * up).sum().backward()
        return tuple(x.grad for x in (h, w) if x.grad is not None)

    with using(way) as impl:
        found = (extra_mib(forward), extra_mib(lambda: both(True)), extra_mib(lambda: both(False)))
    assert all(x <= limit for x, limit in zip(found, most, strict=True)), f"{found} MiB, at most {most}"


@contextmanager
def waits_are_errors() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def every_pass(way: str, n: int = 300, v: int = 4001, d: int = 72) -> list[Tensor]:
    """Outputs and gradients of all kinds of calls."""
    hidden, weight, targets = make(n, v, d)
    bias = torch.linspace(-1, 2, v, device=DEVICE)
    found = []
    with using(way) as impl:
        for options in ({}, {"entropy": True, "bias": bias, "softcap": 5.0}):
            for trained in (True, False):
                leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)[: 3 if trained else 1]]
                given = {**options, "bias": leaves[2]} if trained and options else options
                out = linear_logp(leaves[0], leaves[1] if trained else weight, targets, impl=impl, **given)
                loss = out.logp.sum() if out.entropy is None else out.logp.sum() + out.entropy.square().sum()
                loss.backward()
                found += [*out, *(x.grad for x in leaves)]
        for out in linear_logp_multi([Head(hidden, weight), Head(hidden, weight, softcap=9.0)], targets, impl=impl):
            found += out
    return [x for x in found if x is not None]


@pytest.mark.parametrize("way", WAYS)
def test_no_wait_for_the_device(way: str) -> None:
    expected = every_pass(way)  # compiles
    with waits_are_errors():
        found = every_pass(way)
    assert all(map(torch.equal, found, expected))
    with pytest.raises(RuntimeError, match="synchronizing"), waits_are_errors():
        found[0].sum().item()  # the test can tell


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(1000, 50257, 768), (2500, 32000, 896)])
def test_runs_are_bitwise_equal(way: str, shape: tuple[int, int, int]) -> None:
    first = every_pass(way, *shape)
    assert len(first) == 21
    for _ in range(2):
        assert all(map(torch.equal, every_pass(way, *shape), first))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_logits_of_ten_thousand(way: str, dtype: torch.dtype) -> None:
    hidden, weight, targets = make(300, 4001, 72, spread=1e4 / 16, dtype=dtype)
    hidden = (hidden * 16).requires_grad_()
    weight.requires_grad_()
    z = hidden.detach().double() @ weight.detach().double().T
    assert z.abs().max() > 3e4
    truth = torch.log_softmax(z, -1).gather(1, targets[:, None])[:, 0]
    with using(way) as impl:
        frozen = linear_logp(hidden, weight.detach(), targets, impl=impl)
        out = linear_logp(hidden, weight, targets, entropy=True, impl=impl)
        (pull,) = torch.autograd.grad(frozen.logp.sum(), hidden)
        (out.logp.sum() + out.entropy.sum()).backward()
    assert all(x.isfinite().all() for x in (*out, pull, hidden.grad, weight.grad))
    torch.testing.assert_close(out.logp.double(), truth, rtol=2e-6, atol=0.05)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("way", WAYS)
def test_forbidden_tokens(way: str, softcap: float | None) -> None:
    hidden, weight, targets = (x.requires_grad_(x.is_floating_point()) for x in make(300, 4001, 72))
    bias = torch.zeros(4001, device=DEVICE)
    bias[:2900] = -math.inf  # whole tiles, splits and chunks
    bias.requires_grad_()
    targets = 2900 + targets % 1101
    with using(way) as impl:
        frozen = linear_logp(hidden, weight.detach(), targets, bias=bias.detach(), softcap=softcap, impl=impl)
        (pull,) = torch.autograd.grad(frozen.logp.sum(), hidden)
        out = linear_logp(hidden, weight, targets, bias=bias, softcap=softcap, entropy=True, impl=impl)
        (out.logp.sum() + 2 * out.entropy.sum()).backward()
    assert all(x.isfinite().all() for x in (*out, pull, hidden.grad, weight.grad, bias.grad))
    if softcap is None:
        z = hidden.detach().double() @ weight.detach()[2900:].double().T
        truth = torch.log_softmax(z, -1).gather(1, targets[:, None] - 2900)[:, 0]
        torch.testing.assert_close(out.logp.double(), truth, rtol=0, atol=2e-5)
        assert not weight.grad[:2900].any()


def test_log_ratios_as_in_pytorch_without_a_wait() -> None:
    lengths = torch.tensor([0, 1, 3, 0, 1023, 1024, 1025, 7000, 0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(DEVICE)
    logp, ref = (-5 * torch.rand(2, int(lengths.sum()), device=DEVICE)).unbind()
    for cu in (offsets, offsets.int()):
        for reference in (ref, None):
            runs = []
            for impl in ("triton", "eager"):
                policy = logp.clone().requires_grad_()
                seq_logratio(policy, reference, cu, impl=impl)
                with waits_are_errors():
                    out = seq_logratio(policy, reference, cu, impl=impl)
                    (out.logratio * torch.linspace(-1, 1, 9, device=DEVICE)).sum().backward()
                runs.append((*(x for x in out if x is not None), policy.grad))
            torch.testing.assert_close(runs[0], runs[1], rtol=2e-7, atol=0)
            assert runs[0][0][[0, 3, 8]].tolist() == [0.0] * 3, "empty sequences"
    assert (seq_logratio(logp, logp.clone(), offsets, impl="triton").logratio == 0).all()


def test_what_auto_takes_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._tell.cache_clear()
    with caplog.at_level(logging.INFO, logger="halos_kernels"):
        for _ in range(2):
            for d, dtype in ((72, torch.bfloat16), (4096, torch.bfloat16), (72, torch.float64)):
                linear_logp(*make(5, 300, d, dtype=dtype))
    said = [record.getMessage().partition("takes ")[2] for record in caplog.records]
    *paths, eager = said
    assert paths in (["Triton, tiled"], ["Triton, chunked"], ["Triton, tiled", "Triton, chunked"]), "as was measured"
    assert eager.startswith("eager (float64")


def test_devices_that_differ_are_named() -> None:
    hidden, weight, targets = make(5, 30, 8)
    with pytest.raises(ValueError, match="weight must be on hidden's device cpu, got cuda"):
        linear_logp(hidden.cpu(), weight, targets.cpu())
    with pytest.raises(ValueError, match="targets must be on hidden's device cuda:0, got cpu"):
        linear_logp(hidden, weight, targets.cpu())


SCRIPT = """
import sys
import torch
from halos_kernels import dispatch, linear_logp, seq_logratio
device, last = sys.argv[1], int(sys.argv[2])
for d, way in ((72, "tiled"), (70, "tiled"), (72, "chunked")):
    hidden, weight = (torch.ones(n, d, dtype=torch.bfloat16, device=device).requires_grad_() for n in (130, 1001))
    targets = torch.arange(130, device=device)
    targets[-1] = last
    with dispatch.forced(way):
        try:
            out = linear_logp(hidden, weight, targets, entropy=True, impl="triton")
            (out.logp.sum() + out.entropy.sum()).backward()
            linear_logp(hidden, weight.detach(), targets, impl="triton").logp.sum().backward()
            seq_logratio(out.logp, None, torch.tensor([0, 0, 130], device=device), impl="triton").logp.sum().item()
        except ValueError as error:
            print(error)
print("ran")
"""


def script(last: int, *before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-c", SCRIPT, DEVICE, str(last)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("last", [1001, -1])
def test_targets_out_of_range(last: int) -> None:
    checked = script(last, HALOS_CHECK="1")
    assert checked.stdout.count("targets must be in [0, 1001), got ") == 3, checked.stderr
    unchecked = script(last, HALOS_CHECK="0")
    assert unchecked.returncode != 0
    assert "device-side assert" in unchecked.stderr


def test_no_access_out_of_bounds() -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on the PATH")
    done = script(
        1000,
        *(sanitizer, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"),
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # each tensor an allocation of its own
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "ran" in done.stdout
