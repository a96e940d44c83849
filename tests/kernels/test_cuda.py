"""What only a GPU can show of the eager functions: half-precision products with float32 sums, without host waits."""

from __future__ import annotations

import pytest
import torch
from halos_kernels import linear_logp, seq_logratio

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "vocabulary", "d"), [(1, 7, 8), (300, 4001, 72)])
def test_values_and_gradients_follow_float64(dtype: torch.dtype, n: int, vocabulary: int, d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, d, generator=generator) / d**0.5).to(dtype)
    targets = torch.randint(vocabulary, (n,), generator=generator)
    upstream = torch.linspace(-1, 2, n)
    results = []
    for device, to in (("cpu", torch.float64), ("cuda", dtype)):
        h, w = (x.to(device, to).requires_grad_() for x in (hidden, weight))
        logp = linear_logp(h, w, targets.to(device)).logp
        (logp * upstream.to(logp)).sum().backward()
        assert h.grad is not None
        assert w.grad is not None
        results.append([x.detach().double().cpu() for x in (logp, h.grad, w.grad)])
    truth, ours = results
    torch.testing.assert_close(ours[0], truth[0], atol=1e-4, rtol=1e-5)
    for a, b in zip(ours[1:], truth[1:], strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()


def test_log_ratios_without_a_wait_for_the_device() -> None:
    logp = torch.randn(10, device="cuda", requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 10], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = seq_logratio(logp, logp.detach(), offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (out.logratio == 0).all()
    out.logratio.sum().backward()
    assert logp.grad is not None
    assert (logp.grad == 1).all()
