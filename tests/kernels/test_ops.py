"""The operators as `torch.compile`, fake tensors and autograd see them."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from halos_kernels import Head, linear_logp, linear_logp_multi, ops, seq_logratio


@pytest.fixture(params=["eager", "triton"])
def impl(request):
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("in the interpreter only")
    return request.param


def tensors(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=g).to(dtype).requires_grad_() for n in (9, 50))
    return hidden, weight, torch.randint(50, (9,), generator=g)


def test_every_operator_passes_torchs_own_check(impl):
    hidden, weight, targets = tensors()
    bias, still = torch.randn(50, requires_grad=True), weight.detach()
    logp, offsets = torch.randn(9, requires_grad=True), torch.tensor([0, 4, 4, 9])
    check = torch.library.opcheck
    check(ops.linear_logp, (hidden, weight, None, targets, 1.0, None, 1.0, False, impl))
    check(ops.linear_logp, (hidden, weight, bias, targets, 0.7, 3.0, 1.3, True, impl))
    check(ops.linear_logp_frozen, (hidden, still, None, targets, 1.0, None, 1.0, impl))
    heads = ([hidden.detach()] * 2, [still] * 2, [None, bias.detach()], targets, [1.0] * 2, [0.0, 3.0], [1.0] * 2)
    check(ops.linear_logp_multi, (*heads, True, impl))
    check(ops.scale_rows, (hidden.detach(), logp.detach()))
    check(ops.seq_logratio, (logp, None, offsets, impl))
    check(ops.seq_logratio, (logp, logp.detach(), offsets, impl))
    lse, nothing = torch.randn(9), torch.empty(0)
    backward = (hidden.detach(), still, None, targets, lse, nothing, logp.detach(), None, 1.0, None, 1.0)
    check(ops.linear_logp_backward, (*backward, [True, True, False], impl))


def log_ratios(hidden, weight, targets, impl):
    out = linear_logp(hidden, weight, targets, entropy=True, softcap=10.0, impl=impl)
    with torch.no_grad():
        reference = linear_logp_multi([Head(hidden, weight * 0.5)], targets, impl=impl)[0]
    sums = seq_logratio(out.logp, reference.logp, torch.tensor([0, 4, 9]), impl=impl)
    return sums.logratio.sum() + out.entropy.sum() + linear_logp(hidden, weight.detach(), targets, impl=impl).logp.sum()


def test_compiles_without_a_graph_break_to_the_same_bits(impl):
    hidden, weight, targets = tensors()
    compiled = torch.compile(log_ratios, backend="aot_eager", fullgraph=True)
    runs = []
    for function in (log_ratios, compiled):
        value = function(hidden, weight, targets, impl)
        runs.append((value, *torch.autograd.grad(value, (hidden, weight))))
    assert all(map(torch.equal, *runs))


def test_dynamic_numbers_of_tokens_compile_once():
    hidden, weight, targets = tensors()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda h, y: linear_logp(h, weight, y).logp, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for n in (9, 7, 5, 4):
        some, own = hidden[:n].detach().clone().requires_grad_(), targets[:n].clone()  # no views, which are guarded
        assert torch.equal(compiled(some, own), linear_logp(some, weight, own).logp)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


def test_inference_mode_and_several_heads_carry_no_gradient():
    hidden, weight, targets = tensors()
    assert not any(out.logp.requires_grad for out in linear_logp_multi([Head(hidden, weight)], targets))
    with torch.inference_mode():
        out = linear_logp(hidden, weight, targets)
    assert torch.equal(out.logp, linear_logp(hidden, weight, targets).logp)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([], "heads must hold at least one Head, got none"),
        ([(2, 3, 4), (2, 5, 4)], r"heads\[1\]: weight must be \[V, 5\] with V > 0, got \[4, 3\]"),
        ([(2, 3, 4), (1, 3, 4)], r"heads\[1\]: targets must be \[1\], got \[2\]"),
    ],
)
def test_bad_heads_are_named(heads, message):
    made = [Head(torch.zeros(n, d), torch.zeros(v, 3)) for n, d, v in heads]
    with pytest.raises(ValueError, match=message):
        linear_logp_multi(made, torch.zeros(2, dtype=torch.long))


def test_heads_may_be_one_or_any_iterable_but_must_be_heads():
    head, targets = Head(torch.zeros(2, 3), torch.zeros(4, 3)), torch.zeros(2, dtype=torch.long)
    one = linear_logp_multi(head, targets)
    assert torch.equal(one[0].logp, linear_logp_multi((x for x in [head]), targets)[0].logp)
    with pytest.raises(ValueError, match="heads must be of type Head, got Tensor"):
        linear_logp_multi([head.hidden], targets)


def test_a_target_outside_one_of_the_vocabularies():
    made = [Head(torch.zeros(2, 3), torch.zeros(v, 3)) for v in (9, 4)]
    with pytest.raises(ValueError, match=r"heads\[1\]: targets must be in \[0, 4\), got 0 to 7; select"):
        linear_logp_multi(made, torch.tensor([0, 7]))
