from __future__ import annotations

import doctest
import functools
import importlib
import math
import re
from pathlib import Path

import halos_kernels
import pytest
import torch

OFFSETS = torch.tensor([0, 0, 3, 4, 4, 11, 11])
BOUNDS = [(0, 0), (0, 3), (3, 4), (4, 4), (4, 11), (11, 11)]


@pytest.fixture(params=["eager", "triton"], autouse=True)
def seq_logratio(request):
    """Both implementations; Triton's in the interpreter."""
    return functools.partial(halos_kernels.seq_logratio, impl=request.param)


def sequences(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return tuple(-5 * torch.rand(2, 11, generator=g, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_sums_of_differences(dtype, index, seq_logratio):
    logp, ref = sequences(dtype)
    out = seq_logratio(logp, ref, OFFSETS.to(index))
    for name, x in (("logratio", logp.double() - ref.double()), ("logp", logp), ("ref_logp", ref)):
        exact = torch.tensor([math.fsum(x[a:b].tolist()) for a, b in BOUNDS], dtype=torch.float64)
        got = getattr(out, name)
        assert got.dtype == dtype
        torch.testing.assert_close(got, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_without_a_reference(seq_logratio):
    logp, _ = sequences()
    out = seq_logratio(logp, None, OFFSETS)
    assert out.ref_logp is None
    assert torch.equal(out.logratio, out.logp)
    assert out.logp[2] == logp[3]


def test_small_ratios_survive_a_hundred_thousand_tokens(seq_logratio):
    g = torch.Generator().manual_seed(0)
    ref = -20 * torch.rand(100_000, generator=g)
    logp = (ref.double() + 1e-6 * torch.randn(100_000, generator=g, dtype=torch.float64)).float()
    out = seq_logratio(logp, ref, torch.tensor([0, 100_000])).logratio
    exact = math.fsum((logp.double() - ref.double()).tolist())
    assert out.item() == pytest.approx(exact, rel=1e-7)


def test_equal_policy_and_reference_give_exactly_zero(seq_logratio):
    logp, _ = sequences()
    assert seq_logratio(logp, logp.clone(), OFFSETS).logratio.tolist() == [0.0] * 6


def test_a_sequence_depends_on_its_own_tokens_only(seq_logratio):
    logp, ref = sequences()
    whole = seq_logratio(logp, ref, OFFSETS).logratio
    alone = [seq_logratio(logp[a:b], ref[a:b], torch.tensor([0, b - a])).logratio for a, b in BOUNDS]
    assert torch.equal(whole, torch.cat(alone))


def test_gradients(seq_logratio):
    logp, ref = (x.requires_grad_() for x in sequences(torch.float64))
    assert torch.autograd.gradcheck(lambda p, r: seq_logratio(p, r, OFFSETS), (logp, ref))
    assert torch.autograd.gradcheck(lambda p: seq_logratio(p, None, OFFSETS)[:2], (logp,))
    upstream = torch.tensor([7.0, 2.0, -3.0, 11.0, 0.5, 13.0], dtype=torch.float64)  # 7, 11 and 13 meet empty sequences
    (seq_logratio(logp, ref, OFFSETS).logratio @ upstream).backward()
    assert logp.grad.tolist() == [2.0] * 3 + [-3.0] + [0.5] * 7
    assert ref.grad.tolist() == [-2.0] * 3 + [3.0] + [-0.5] * 7


def test_a_fixed_reference_gets_no_gradient(seq_logratio):
    logp, ref = sequences()
    out = seq_logratio(logp.requires_grad_(), ref, OFFSETS)
    assert out.logratio.requires_grad
    assert not out.ref_logp.requires_grad


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_no_tokens(offsets, seq_logratio):
    logp = torch.zeros(0, requires_grad=True)
    out = seq_logratio(logp, torch.zeros(0), torch.tensor(offsets))
    assert out.logratio.tolist() == [0.0] * (len(offsets) - 1)
    out.logratio.sum().backward()
    assert logp.grad.shape == (0,)


Sharded = type("Sharded", (torch.Tensor,), {"placements": ("Shard(0)",)})
P, C = torch.zeros(4), torch.tensor([0, 1, 4])
BAD = {
    "logp rank": ((P[:, None], P, C), "logp must have one dimension, got [4, 1]"),
    "logp dtype": ((P.bfloat16(), None, C), "logp must be float32 or float64, got torch.bfloat16"),
    "logp type": (([0.0], None, C), "logp must be a tensor, got list"),
    "ref shape": ((P, P[:3], C), "ref_logp must be [4] torch.float32 like logp, got [3] torch.float32"),
    "ref rank": ((P, P[:, None], C), "ref_logp must have one dimension, got [4, 1]"),
    "ref dtype": ((P, P.double(), C), "ref_logp must be [4] torch.float32 like logp, got [4] torch.float64"),
    "ref device": ((P, P.to("meta"), C), "ref_logp must be on logp's device cpu, got meta"),
    "offsets dtype": ((P, P, C.float()), "cu_seqlens must be int64 or int32 [B + 1], got [3] torch.float32"),
    "offsets empty": ((P, P, C[:0]), "cu_seqlens must be int64 or int32 [B + 1], got [0] torch.int64"),
    "offsets start": ((P, P, torch.tensor([1, 4])), "cu_seqlens must rise from 0 to logp's length 4, got [1, 4]"),
    "offsets end": ((P, P, torch.tensor([0, 3])), "cu_seqlens must rise from 0 to logp's length 4, got [0, 3]"),
    "offsets wrap": (
        (P, P, torch.tensor([0, 2**63 - 1, -(2**63), 4])),
        "cu_seqlens must rise from 0 to logp's length 4",
    ),
    "logp sharded": ((P.as_subclass(Sharded), None, C), "logp must be a plain tensor, got a DTensor"),
    "offsets fall": ((P, P, torch.tensor([0, 3, 2, 4])), "got [0, 3, 2, 4]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, seq_logratio):
    args, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        seq_logratio(*args)


def test_an_unknown_implementation():
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'triton', 'eager', got 'cuda'"):
        halos_kernels.seq_logratio(P, None, C, impl="cuda")


def test_strided_inputs(seq_logratio):
    logp, ref = torch.stack(sequences(), 1).unbind(1)
    offsets = torch.stack([OFFSETS, OFFSETS], 1)[:, 0]
    assert not logp.is_contiguous()
    torch.testing.assert_close(tuple(seq_logratio(logp, ref, offsets)), tuple(seq_logratio(*sequences(), OFFSETS)))


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_kernels.seq_logratio"))
    assert result.attempted
    assert not result.failed


def test_readme_examples():
    text = Path(halos_kernels.__file__).with_name("README.md").read_text(encoding="utf-8")
    names: dict[str, torch.Tensor] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    assert names["ratios"].shape == (3,)
