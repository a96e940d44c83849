"""Triton's two strategies, in the interpreter: forward and every gradient against float64 autograd of whole logits.

Over 300 lines: one contract, option by option, for both strategies.
"""

from __future__ import annotations

import math

import pytest
import torch
from halos_kernels import Head, dispatch, linear_logp, linear_logp_multi, seq_logratio
from halos_kernels.chunks import LIMITS, Limits
from halos_kernels.inputs import Inputs, Transform
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda covers it without the interpreter")

SHAPES = [(1, 17, 8), (7, 131, 20), (33, 257, 33), (70, 515, 96), (97, 1000, 130)]  # N, V, d
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale and temperature": {"logit_scale": 0.7, "temperature": 1.6},
    "all": {"bias": True, "softcap": 5.0, "logit_scale": 0.7, "temperature": 1.6},
}
GRADIENT = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}  # relative to the norm


@pytest.fixture(params=["tiled", "chunked"], autouse=True)
def strategy(request):
    with dispatch.forced(request.param):
        yield request.param


@pytest.fixture(params=["small chunks and blocks of rows", "one chunk of several tiles"])
def chunks(request, monkeypatch):
    small = Limits(workspace=40_000, columns=1, rows=40, parts=4)
    one = Limits(workspace=1 << 20, columns=1, rows=1000, parts=1)
    monkeypatch.setitem(LIMITS, "cpu", small if request.param.startswith("small") else one)


def make(n: int, v: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    weight = (torch.randn(v, d, generator=g) * 4 / math.sqrt(d)).to(dtype)
    targets = torch.randint(v, (n,), generator=g)
    targets[0] = v - 1
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def with_bias(options: dict, v: int, dtype: torch.dtype) -> dict:
    bias = torch.linspace(-1, 2, v).to(dtype).requires_grad_()
    return {**options, "bias": bias} if options.get("bias") else dict(options)


def naive(hidden, weight, targets, *, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * logit_scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    log_p = torch.log_softmax(z, -1)
    return log_p.gather(1, targets[:, None])[:, 0], torch.logsumexp(z, -1), -(log_p.exp() * log_p).sum(1)


def exact(x):
    return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def check(n, v, d, dtype, options, *, entropy: bool, frozen: bool) -> None:
    hidden, weight, targets = make(n, v, d, dtype)
    options = with_bias(options, v, dtype)
    leaves = [hidden, weight, *([options["bias"]] if "bias" in options else [])]
    for leaf in leaves[1:]:
        leaf.requires_grad_(not frozen)
    h, w = exact(hidden), exact(weight)
    exact_options = {k: exact(x) for k, x in options.items()}
    truth = naive(h, w, targets, **exact_options)
    out = linear_logp(hidden, weight, targets, entropy=entropy, impl="triton", **options)
    for got, want in zip(out[: 2 + entropy], truth, strict=False):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= 2e-5
    up, up_entropy = torch.randn(2, n, generator=torch.Generator().manual_seed(1))
    loss, true_loss = out.logp @ up, truth[0] @ up.double()
    if entropy:
        loss, true_loss = loss + out.entropy @ up_entropy, true_loss + truth[2] @ up_entropy.double()
    loss.backward()
    true_loss.backward()
    truths = [h, w, *([exact_options["bias"]] if "bias" in options else [])]
    for leaf, true in zip(leaves, truths, strict=True):
        assert (leaf.grad is None) == (true.grad is None)
        if leaf.grad is not None:
            assert leaf.grad.dtype == dtype
            assert error(leaf.grad, true.grad) <= GRADIENT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["trainable", "entropy", "frozen", "frozen, entropy"])
def test_outputs_and_gradients(shape, dtype, kind):
    check(*shape, dtype, {}, entropy="entropy" in kind, frozen="frozen" in kind)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["trainable", "entropy", "frozen", "frozen, entropy"])
def test_every_option(name, dtype, kind):
    check(70, 515, 33, dtype, OPTIONS[name], entropy="entropy" in kind, frozen="frozen" in kind)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["trainable", "entropy", "frozen", "frozen, entropy"])
def test_every_option_at_every_shape(shape, name, dtype, kind):
    check(*shape, dtype, OPTIONS[name], entropy="entropy" in kind, frozen="frozen" in kind)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("softcap", [None, 9.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pass_over_the_same_rows_gives_the_same_bits(dtype, softcap):
    hidden, weight, targets = make(70, 515, 33, dtype)
    trainable = linear_logp(hidden, weight, targets, softcap=softcap, impl="triton")
    frozen = linear_logp(hidden, weight.detach(), targets, softcap=softcap, impl="triton")
    entropy = linear_logp(hidden, weight, targets, softcap=softcap, entropy=True, impl="triton")
    with torch.no_grad():
        plain = linear_logp(hidden, weight, targets, softcap=softcap, impl="triton")
    heads = [Head(hidden, weight, softcap=softcap), Head(hidden * 2, weight.flip(0), softcap=softcap)]
    pair = linear_logp_multi([*heads, heads[0]], targets, impl="triton")
    for other in (trainable, frozen, entropy, pair[0], pair[2]):
        assert torch.equal(other.logp, plain.logp)
        assert torch.equal(other.lse, plain.lse)
    with torch.no_grad():
        second = linear_logp(hidden * 2, weight.flip(0), targets, softcap=softcap, impl="triton")
    assert torch.equal(pair[1].logp, second.logp)
    assert not torch.equal(pair[1].logp, plain.logp)
    ratio = seq_logratio(trainable.logp, pair[0].logp, torch.tensor([0, 9, 9, 70]), impl="triton")
    assert ratio.logratio.tolist() == [0.0, 0.0, 0.0]


def test_two_heads_of_the_tiled_strategy_share_a_launch(strategy, monkeypatch):
    from halos_kernels import tiled

    hidden, weight, targets = make(33, 257, 33, torch.float32)
    launches = []
    real = tiled._statistics
    monkeypatch.setattr(
        tiled, "_statistics", lambda heads, *a, **k: launches.append(len(heads)) or real(heads, *a, **k)
    )
    bias = torch.linspace(-1, 2, 257)
    options = [{"bias": bias}, {"bias": bias.flip(0)}, {"bias": bias, "temperature": 2.0}, {}]
    outs = linear_logp_multi([Head(hidden, weight, **x) for x in options], targets, entropy=True, impl="triton")
    assert launches == ([2, 1, 1] if strategy == "tiled" else []), "the third and fourth have nothing alike"
    for out, own in zip(outs, options, strict=True):
        with torch.no_grad():
            alone = linear_logp(hidden, weight, targets, entropy=True, impl="triton", **own)
        assert all(map(torch.equal, out, alone))


def test_a_row_alone_gives_the_bits_of_the_row_in_a_batch(strategy):
    """Of integers, whose products NumPy sums exactly in any order: the order in question is that of the vocabulary."""
    if strategy != "tiled":
        pytest.skip("the vendor's products depend on the batch")
    g = torch.Generator().manual_seed(0)
    hidden = torch.randint(-3, 4, (97, 130), generator=g).bfloat16()
    weight = torch.randint(-2, 3, (1000, 130), generator=g).bfloat16()
    targets = torch.randint(1000, (97,), generator=g)

    def logp(rows):
        return linear_logp(hidden[rows], weight, targets[rows], temperature=30.0, impl="triton").logp

    whole = logp(slice(None))
    order = torch.randperm(97, generator=g)
    assert torch.equal(logp(order), whole[order])
    assert torch.equal(logp(slice(40, 47)), whole[40:47])


def test_runs_are_bitwise_equal():
    hidden, weight, targets = make(70, 515, 96, torch.bfloat16)
    runs = []
    for _ in range(2):
        out = linear_logp(hidden, weight, targets, entropy=True, impl="triton")
        loss = out.logp.sum() + out.entropy.sum()
        runs.append((*out, *torch.autograd.grad(loss, (hidden, weight))))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("low", [-math.inf, -1e30, -1e4])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_forbidden_tokens_and_very_negative_logits_give_no_nan(low, softcap):
    hidden, weight, _ = make(9, 300, 16, torch.float32)
    bias = torch.zeros(300)
    bias[:290] = low  # whole tiles and chunks
    bias.requires_grad_()
    targets = torch.arange(290, 299)
    out = linear_logp(hidden, weight, targets, bias=bias, entropy=True, softcap=softcap, impl="triton")
    (out.logp.sum() + 2 * out.entropy.sum()).backward()
    assert all(x.isfinite().all() for x in (*out, hidden.grad, weight.grad, bias.grad))
    if softcap is None:
        truth = naive(hidden.double(), weight[290:].double(), targets - 290)
        for got, want in zip(out, truth, strict=True):
            assert (got - want).abs().max() < 2e-5
    frozen = linear_logp(hidden, weight.detach(), targets, bias=bias.detach(), softcap=softcap, impl="triton")
    assert torch.equal(frozen.logp, out.logp)
    (grad,) = torch.autograd.grad(frozen.logp.sum(), hidden)
    assert grad.isfinite().all()


def test_logits_of_ten_thousand_and_a_common_offset():
    hidden, weight, targets = make(9, 400, 16, torch.float32)
    hidden, weight = (hidden.detach() * 2500).requires_grad_(), weight
    out = linear_logp(hidden, weight, targets, entropy=True, impl="triton")
    (out.logp.sum() + out.entropy.sum()).backward()
    assert all(x.isfinite().all() for x in (*out, hidden.grad, weight.grad))
    truth = naive(hidden.double(), weight.double(), targets)[0]
    assert truth.abs().max() > 1e4
    assert ((out.logp - truth).abs() / truth.abs().clamp_min(1)).max() < 1e-5
    same = torch.zeros(400, 16)
    same[:, 0] = -1e4
    logp = linear_logp(torch.ones(9, 16), same, targets, impl="triton").logp
    assert (logp + math.log(400)).abs().max() < 1e-5


@pytest.mark.parametrize("entropy", [False, True])
def test_not_a_number_stays_in_its_row(entropy):
    hidden, weight, targets = make(9, 300, 16, torch.float32)
    poisoned = hidden.detach().clone()
    poisoned[3, 5], poisoned[6, 2] = math.nan, math.inf
    out = linear_logp(poisoned, weight, targets, entropy=entropy, impl="triton")
    clean = linear_logp(hidden, weight, targets, impl="triton").logp
    assert not any(x[[3, 6]].isfinite().any() for x in out if x is not None)
    rest = [0, 1, 2, 4, 5, 7, 8]
    torch.testing.assert_close(out.logp[rest], clean[rest], rtol=1e-6, atol=1e-6)
    bad = weight.detach().clone()
    bad[0, 3] = math.nan
    out = linear_logp(hidden, bad, targets, entropy=entropy, impl="triton")
    assert not any(x.isfinite().any() for x in out if x is not None)


def test_strided_inputs(strategy):
    hidden, weight, targets = make(16, 60, 24, torch.float32)
    truth = naive(hidden[::2, ::2].double(), weight.T[::2].T.double(), targets[::2])[0]
    cases = {
        "both strided": (hidden[::2, ::2], weight.T[::2].T),
        "transposed weight": (hidden[::2, ::2].contiguous(), weight.T[::2].contiguous().T),
        "rows of a wider matrix": (hidden[::2, ::2].contiguous(), torch.cat([weight.T[::2].T] * 2, 1)[:, :12]),
        "offset by one element": (
            torch.cat([hidden[:1, 0], hidden[::2, ::2].flatten()])[1:].view(8, 12),
            weight.T[::2].T,
        ),
    }
    for name, (h, w) in cases.items():
        with torch.no_grad():
            if strategy == "tiled" and (h.stride(1) != 1 or w.stride(1) != 1):
                with pytest.raises(ValueError, match=r"the tiled strategy needs"):
                    linear_logp(h, w, targets[::2], impl="triton")
                continue
            logp = linear_logp(h, w, targets[::2].int(), impl="triton").logp
        assert (logp - truth).abs().max() < 2e-6, name


def test_descriptors_give_the_bits_of_pointers(strategy, monkeypatch):
    from halos_kernels import tiled

    if strategy != "tiled":
        pytest.skip("of the tiled strategy")
    hidden, weight, targets = make(70, 515, 96, torch.bfloat16)
    runs = []
    for there in (False, True):
        monkeypatch.setattr(tiled, "DESCRIPTORS", ("interpreter",) if there else ())
        assert (
            tiled._operands(
                [Inputs(hidden, weight, None, targets, Transform(), 70)], dispatch.tile("forward", "interpreter")
            )[1]
            is there
        )
        out = linear_logp(hidden, weight, targets, impl="triton")
        runs.append((*out[:2], *torch.autograd.grad(out.logp.sum(), (hidden, weight))))
    assert all(map(torch.equal, *runs))
    odd = torch.randn(4, 9, dtype=torch.bfloat16)  # rows of 18 bytes
    heads = [
        Inputs(hidden, weight, None, targets, Transform(), 70),
        Inputs(odd, odd, None, targets[:4], Transform(), 4),
    ]
    assert not tiled._operands(heads, dispatch.tile("forward", "interpreter"))[1], "pointers for both, or none"


def test_no_tokens():
    hidden, weight, targets = make(1, 17, 8, torch.float32)
    out = linear_logp(hidden[:0], weight, targets[:0], entropy=True, impl="triton")
    (out.logp.sum() + out.entropy.sum()).backward()
    assert all(x.shape == (0,) for x in out)
    assert not weight.grad.any()


@pytest.mark.parametrize("frozen", [False, True])
def test_no_tensor_of_tokens_times_vocabulary(frozen, allocations):
    n, v, d = 260, 3000, 32
    hidden, weight, targets = make(n, v, d, torch.float32)
    weight.requires_grad_(not frozen)
    with allocations(hidden, weight) as seen:
        linear_logp(hidden, weight, targets, impl="triton").logp.sum().backward()
    assert n < seen.largest < n * v // 4
    assert seen.peak < n * v
