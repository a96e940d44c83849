"""The eager twin. Truth is float64 autograd of the formula, written with a whole logits matrix.

Over 300 lines: the contract of one function, option by option.
"""

from __future__ import annotations

import doctest
import functools
import importlib
import math
import re

import pytest
import torch
from halos_kernels import linear_logp, seq_logratio
from halos_kernels.chunks import LIMITS, Limits
from halos_kernels.inputs import Inputs
from torch import Tensor

MODULE = importlib.import_module("halos_kernels.linear_logp")  # the package attribute of this name is the function
SHAPES = [(7, 5, 13), (1, 8, 37), (33, 16, 2), (5, 3, 1), (129, 24, 301)]  # N, d, V
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.37},
    "softcap": {"softcap": 1.5},
    "temperature": {"temperature": 0.6},
    "all": {"bias": True, "logit_scale": 1.7, "softcap": 3.0, "temperature": 1.3},
}


def make(n: int, d: int, v: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    draw = (torch.randn(rows, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for rows in (n, v))
    return *draw, torch.randint(v, (n,), generator=g)


def naive(hidden, weight, targets, *, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, -1)
    return log_p.gather(1, targets[:, None])[:, 0], torch.logsumexp(z / temperature, -1), -(log_p.exp() * log_p).sum(1)


def with_bias(options: dict, v: int, dtype: torch.dtype = torch.float64) -> dict:
    bias = torch.linspace(-1, 2, v, dtype=torch.float64).to(dtype).requires_grad_()
    return {**options, "bias": bias} if options.get("bias") else options


@pytest.fixture(params=["one chunk", "many chunks and blocks of rows"])
def chunks(request, monkeypatch):
    if request.param != "one chunk":
        monkeypatch.setitem(LIMITS, "cpu", Limits(workspace=3 * 8 * 33, columns=1, rows=5, parts=2))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_every_gradient_equal_float64_autograd(shape, name):
    n, _, v = shape
    hidden, weight, targets = make(*shape)
    options = with_bias(OPTIONS[name], v)
    leaves = [hidden, weight] + ([options["bias"]] if "bias" in options else [])
    up_logp, up_entropy = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    out = linear_logp(hidden, weight, targets, entropy=True, **options)
    logp, lse, entropy = naive(hidden, weight, targets, **options)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(tuple(out), (logp, lse, entropy), **close)
    for ours, theirs in (
        (out.logp @ up_logp, logp @ up_logp),
        (out.entropy @ up_entropy, entropy @ up_entropy),
        (out.logp @ up_logp + out.entropy @ up_entropy, logp @ up_logp + entropy @ up_entropy),
    ):
        got = torch.autograd.grad(ours, leaves, retain_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(theirs, leaves, retain_graph=True), **close)


def test_gradcheck():
    hidden, weight, targets = make(4, 3, 7)
    options = with_bias(OPTIONS["all"], 7)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logp(h, w, targets, entropy=True, **{**options, "bias": b})[::2],
        (hidden, weight, options["bias"]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_reduced_precision_against_float64_truth(name, dtype):
    hidden, weight, targets = make(65, 48, 301, dtype)
    options = with_bias(OPTIONS[name], 301, dtype)
    out = linear_logp(hidden, weight, targets, entropy=True, **options)
    (out.logp.sum() + 0.3 * out.entropy.sum()).backward()
    exact = {k: x.detach().double().requires_grad_() if isinstance(x, Tensor) else x for k, x in options.items()}
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logp, lse, entropy = naive(h, w, targets, **exact)
    (logp.sum() + 0.3 * entropy.sum()).backward()
    for got, want in zip(out, (logp, lse, entropy), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-5)
    pairs = [(hidden, h), (weight, w)] + ([(options["bias"], exact["bias"])] if "bias" in options else [])
    for leaf, truth in pairs:
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=2e-5)


def test_bf16_logratio_of_512_tokens_is_true_to_a_thousandth_nat():
    b, t, d, v = 2, 512, 128, 2048
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(v, d, generator=g) / math.sqrt(d)).bfloat16()
    targets = torch.randint(v, (b * t,), generator=g)
    rows = weight.float()[targets]
    hidden = (torch.randn(b * t, d, generator=g) * 3.2 + rows * 17 / rows.norm(dim=1, keepdim=True) ** 2).bfloat16()
    policy_h = (hidden.float() + 0.02 * 3.2 * torch.randn(b * t, d, generator=g)).bfloat16()
    policy_w = (weight.float() + 0.02 * torch.randn(v, d, generator=g) / math.sqrt(d)).bfloat16()
    heads = ((policy_h, policy_w), (hidden, weight))
    truth = torch.sub(*(naive(h.double(), w.double(), targets)[0] for h, w in heads)).view(b, t).sum(1)

    def error(logp: Tensor, ref_logp: Tensor) -> float:
        return (seq_logratio(logp, ref_logp, torch.tensor([0, t, b * t])).logratio.double() - truth).abs().max().item()

    assert error(*(linear_logp(h, w, targets).logp for h, w in heads)) < 1e-3
    rounded = ((h @ w.T).float() for h, w in heads)  # the test can tell: bf16 logits lose it
    assert error(*(torch.log_softmax(z, -1).gather(1, targets[:, None])[:, 0] for z in rounded)) > 1e-2


def test_mixed_dtypes_compute_in_the_promoted_one():
    hidden, weight, targets = make(6, 8, 11)
    h, w = (x.detach().to(t).requires_grad_() for x, t in ((hidden, torch.bfloat16), (weight, torch.float32)))
    out = linear_logp(h, w, targets, bias=torch.zeros(11, dtype=torch.float16))
    out.logp.sum().backward()
    assert (out.logp.dtype, h.grad.dtype, w.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.logp, naive(h.float(), w, targets)[0])
    assert linear_logp(hidden, w, targets).logp.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_nothing(dtype):
    hidden, weight, targets = make(6, 8, 11, torch.float32)
    weight = weight.detach().to(dtype).requires_grad_()
    runs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logp = linear_logp(hidden, weight, targets).logp
            runs.append((logp, *torch.autograd.grad(logp.sum(), (hidden, weight))))
    assert all(map(torch.equal, *runs))


@pytest.mark.usefixtures("chunks")
def test_no_tokens():
    hidden, weight, targets = make(0, 5, 7)
    out = linear_logp(hidden, weight, targets, **(options := with_bias(OPTIONS["all"], 7)), entropy=True)
    assert all(x.shape == (0,) for x in out)
    (out.logp.sum() + out.entropy.sum()).backward()
    assert hidden.grad.shape == (0, 5)
    assert not torch.cat([weight.grad.flatten(), options["bias"].grad]).any()


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low", [-math.inf, -1e30, -1e4])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_forbidden_tokens_and_very_negative_logits_give_no_nan(dtype, low, softcap):
    hidden, weight, _ = make(9, 4, 12, dtype)
    bias = torch.zeros(12, dtype=dtype)
    bias[[0, 1, 2, 3, 4, 5, 9]] = low  # the whole first chunk
    bias.requires_grad_()
    targets = torch.tensor([6, 7, 8, 10, 11, 6, 7, 8, 10])
    out = linear_logp(hidden, weight, targets, bias=bias, entropy=True, softcap=softcap)
    (out.logp.sum() + 2 * out.entropy.sum()).backward()
    assert all(x.isfinite().all() for x in (*out, hidden.grad, weight.grad, bias.grad))
    if softcap is None:
        places = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3])  # of the targets, among the tokens kept
        logp, lse, entropy = naive(hidden, weight[bias == 0], places)
        torch.testing.assert_close(tuple(out), (logp, lse, entropy))
        truth = torch.autograd.grad(logp.sum() + 2 * entropy.sum(), hidden)[0]
        torch.testing.assert_close(hidden.grad, truth)


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
def test_only_the_gradients_that_are_needed(needed, allocations):
    hidden, weight, targets = make(6, 7, 9)
    leaves = [hidden, weight, torch.linspace(-1, 1, 9, dtype=torch.float64, requires_grad=True)]
    truth = torch.autograd.grad(naive(hidden, weight, targets, bias=leaves[2])[0].sum(), leaves)
    for leaf, need in zip(leaves, needed, strict=True):
        leaf.requires_grad_(bool(need))
    out = linear_logp(hidden, weight, targets, bias=leaves[2])
    with allocations(*(leaf.detach() for leaf in leaves)) as seen:
        out.logp.sum().backward()
    assert tuple(shape in seen.shapes for shape in ((6, 7), (9, 7), (9,))) == needed
    expected = [want if need else None for want, need in zip(truth, needed, strict=True)]
    torch.testing.assert_close([leaf.grad for leaf in leaves], expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_lse_carries_no_gradient_and_there_is_no_double_backward(frozen):
    hidden, weight, targets = make(3, 4, 5)
    out = linear_logp(hidden, weight.detach() if frozen else weight, targets)
    assert not out.lse.requires_grad
    (grad,) = torch.autograd.grad(out.logp.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(linear_logp(hidden, weight.detach(), targets).logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.square().sum().backward()


def test_forward_mode_differentiation_is_refused():
    hidden, weight, targets = make(3, 4, 5)
    with pytest.raises(ValueError, match="hidden carries a tangent"):
        torch.func.jvp(lambda h: linear_logp(h, weight, targets).logp, (hidden.detach(),), (hidden.detach(),))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_frozen_weight_gives_the_same_values_and_the_true_gradient(shape, name):
    hidden, weight, targets = make(*shape)
    weight.requires_grad_(False)
    options = with_bias(OPTIONS[name], shape[2])
    if "bias" in options:
        options["bias"].requires_grad_(False)
    upstream = torch.linspace(-1, 2, shape[0], dtype=torch.float64)
    out = linear_logp(hidden, weight, targets, **options)
    with torch.no_grad():
        assert torch.equal(out.logp, linear_logp(hidden, weight, targets, **options).logp)
    truth = naive(hidden, weight, targets, **options)[0]
    torch.testing.assert_close(out.logp, truth, rtol=1e-10, atol=1e-10)
    got, want = (torch.autograd.grad(x @ upstream, hidden)[0] for x in (out.logp, truth))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    with_entropy = linear_logp(hidden, weight, targets, entropy=True, **options)
    assert torch.equal(with_entropy.logp, out.logp)
    true_entropy = naive(hidden, weight, targets, **options)[2]
    got, want = (torch.autograd.grad(x @ upstream, hidden)[0] for x in (with_entropy.entropy, true_entropy))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_half_precision_on_a_device_that_multiplies_it_into_float32(monkeypatch):
    """As CUDA does: factors stay in bfloat16, sums are float32. The CPU has no such product, so it is put together."""

    def product(real, *tensors, out_dtype=None, out=None):
        if out_dtype is None:
            return real(*tensors) if out is None else real(*tensors, out=out)
        assert all(x.dtype == torch.bfloat16 for x in tensors[-2:])
        return out.copy_(real(*(x.to(out_dtype) for x in tensors)))

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, functools.partial(product, getattr(torch, name)))
    monkeypatch.setattr(Inputs, "operand", property(lambda self: torch.bfloat16))
    for name, options in OPTIONS.items():
        for frozen in (False, True):
            hidden, weight, targets = make(40, 24, 301, torch.bfloat16)
            weight.requires_grad_(not frozen)
            own = with_bias(options, 301, torch.bfloat16)
            if frozen and "bias" in own:
                own["bias"].requires_grad_(False)
            exact = {k: x.detach().double() if isinstance(x, Tensor) else x for k, x in own.items()}
            h, w = (x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight))
            logp, truth = linear_logp(hidden, weight, targets, **own).logp, naive(h, w, targets, **exact)[0]
            torch.testing.assert_close(logp.double(), truth, rtol=0, atol=2e-5)
            logp.sum().backward()
            truth.sum().backward()
            for leaf, true in ((hidden, h), *(() if frozen else ((weight, w),))):
                assert (leaf.grad.double() - true.grad).norm() <= 6e-3 * true.grad.norm(), (name, frozen)


def test_a_frozen_weight_costs_two_products(monkeypatch):
    """And saves [N, d] alone: the backward touches neither weight nor logits."""
    hidden, weight, targets = make(9, 4, 12)
    saved: list[Tensor] = []
    products = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **kw: products.append(a.shape) or real(a, b, **kw))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = linear_logp(hidden, weight.detach(), targets)
    assert [tuple(x.shape) for x in saved] == [(9, 4)]
    seen = len(products)
    out.logp.sum().backward()
    assert len(products) == seen > 0


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "v"), [(160, 20, 1500), (512, 64, 3000), (1100, 33, 2003)])
def test_no_tensor_and_no_sum_of_tensors_of_tokens_times_vocabulary(n, d, v, dtype, frozen, allocations):
    hidden, weight, targets = make(n, d, v, dtype)
    weight.requires_grad_(not frozen)
    with allocations(hidden, weight) as seen:
        linear_logp(hidden, weight, targets).logp.sum().backward()
    with torch.no_grad(), allocations(hidden, weight) as without_gradients:
        linear_logp(hidden, weight, targets, entropy=True)
    for mode in (seen, without_gradients):
        assert n < mode.largest < n * v // 4
        assert mode.peak < n * v // 4 * max(4, dtype.itemsize)
    with allocations(hidden, weight) as seen:
        (hidden @ weight.T).logsumexp(1)
    assert seen.largest >= n * v, "the measure sees logits where they exist"


def test_saves_the_inputs_and_two_rows_of_numbers_and_nothing_under_no_grad():
    hidden, weight, targets = make(9, 4, 12)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            assert linear_logp(hidden, weight, targets, entropy=True).logp.grad_fn is None
        assert not saved
        out = linear_logp(hidden, weight, targets, entropy=True)
    assert sorted(tuple(x.shape) for x in saved) == [(9,), (9,), (9,), (9, 4), (12, 4)]
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in (hidden, weight, targets, out.lse, out.entropy)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_bitwise_equal_and_policy_equal_to_reference_gives_zero(dtype):
    hidden, weight, targets = make(203, 64, 517, dtype)
    reference = torch.no_grad()(linear_logp)(hidden, weight, targets)
    runs = []
    for _ in range(2):
        policy = linear_logp(hidden, weight, targets)
        runs.append((*policy[:2], *torch.autograd.grad(policy.logp.sum(), (hidden, weight))))
    assert all(map(torch.equal, *runs))
    ratios = seq_logratio(policy.logp, reference.logp, torch.tensor([0, 100, 100, 203])).logratio
    assert ratios.tolist() == [0.0, 0.0, 0.0]


def test_strided_inputs_and_short_integers():
    hidden, weight, targets = make(8, 6, 10)
    h, w, y = hidden[::2, ::2], weight.T[::2].T, targets[::2]
    ours, theirs = linear_logp(h, w, y.int()).logp, naive(h, w, y)[0]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (ours, theirs)))


Sharded = type("Sharded", (Tensor,), {"placements": ("Shard(0)",)})
X, W, Y = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long)
BAD = {
    "hidden rank": ((X[0], W, Y), {}, "hidden must be [N, d], got [3]"),
    "hidden dtype": ((X.long(), W, Y), {}, "hidden must have one of the dtypes torch.bfloat16"),
    "hidden type": (([1.0], W, Y), {}, "hidden must be a tensor, got list"),
    "weight width": ((X, W[:, :2], Y), {}, "weight must be [V, 3] with V > 0, got [5, 2]"),
    "weight empty": ((X, W[:0], Y), {}, "weight must be [V, 3] with V > 0, got [0, 3]"),
    "weight device": ((X, W.to("meta"), Y), {}, "weight must be on hidden's device cpu, got meta"),
    "weight sharded": ((X, W.as_subclass(Sharded), Y), {}, "weight must be a plain tensor, got a DTensor"),
    "targets rank": ((X, W, Y[:, None]), {}, "targets must be [4], got [4, 1]"),
    "targets dtype": ((X, W, Y.float()), {}, "targets must have one of the dtypes torch.int64"),
    "targets high": ((X, W, Y + 5), {}, "targets must be in [0, 5), got 5 to 5"),
    "targets low": ((X, W, Y - 100), {}, "targets must be in [0, 5), got -100 to -100"),
    "bias shape": ((X, W, Y), {"bias": torch.zeros(5, 1)}, "bias must be [5], got [5, 1]"),
    "softcap": ((X, W, Y), {"softcap": 0.0}, "softcap must be a finite number > 0 (up to 1e30), got 0.0"),
    "temperature": ((X, W, Y), {"temperature": -1.0}, "temperature must be a finite number > 0 (up to 1e30), got -1.0"),
    "scale": ((X, W, Y), {"logit_scale": math.inf}, "logit_scale must be a finite number (up to 1e30), got inf"),
    "scale learnt": (
        (X, W, Y),
        {"logit_scale": torch.ones(())},
        "logit_scale must be a finite number (up to 1e30), got tensor(1.)",
    ),
    "temperature tiny": ((X, W, Y), {"temperature": 1e-39}, "temperature must be a finite number > 0"),
    "scale huge": ((X, W, Y), {"logit_scale": 10**400}, "logit_scale must be a finite number (up to 1e30)"),
    "hidden sparse": ((X.to_sparse(), W, Y), {}, "hidden must be dense, got layout torch.sparse_coo"),
    "entropy": ((X, W, Y), {"entropy": "yes"}, "entropy must be True or False, got 'yes'"),
    "impl type": ((X, W, Y), {"impl": None}, "impl must be one of 'auto', 'triton', 'eager', got None"),
    "impl": ((X, W, Y), {"impl": "cuda"}, "impl must be one of 'auto', 'triton', 'eager', got 'cuda'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    args, options, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_logp(*args, **options)


def test_docstring_examples():
    result = doctest.testmod(MODULE)
    assert result.attempted
    assert not result.failed
