"""What only a GPU can show of the numbers: real shapes, tensor cores, tensor descriptors, 64-bit offsets.

Truth is float64 autograd of the formula on the same GPU, a slice of rows at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from halos_kernels import Head, dispatch, linear_logp, linear_logp_multi, seq_logratio
from torch import Tensor

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ELEMENTS = 1 << 26  # of one slice of float64 logits
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GRADIENT = {BF16: 6e-3, FP16: 1e-3, FP32: 1e-5}  # error relative to the norm
WAYS = {  # tiles for float32 do not fit in shared memory: the table never takes them
    BF16: ("tiled", "chunked", "eager"),
    FP16: ("tiled", "chunked", "eager"),
    FP32: ("chunked", "eager"),
}
SHAPES = [(1, 17, 8), (300, 4001, 72), (129, 50257, 768), (1000, 32000, 896), (4096, 151936, 2048)]  # N, V, d
KINDS = ("trained", "entropy", "frozen")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale and temperature": {"logit_scale": 0.7, "temperature": 1.6},
    "all": {"bias": True, "softcap": 5.0, "logit_scale": 0.7, "temperature": 1.6},
}


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    options: dict[str, Any]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.options.get("bias")) if x is not None]

    def map(self, change: Any) -> Case:
        options = {name: change(x) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return Case(change(self.hidden), change(self.weight), self.targets, options)


class Truth(NamedTuple):
    logp: Tensor
    lse: Tensor
    entropy: Tensor
    gradients: list[Tensor]


@pytest.fixture(autouse=True, scope="module")
def _full_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    known.cache_clear()
    torch.cuda.empty_cache()


@contextmanager
def using(way: str) -> Iterator[str]:
    """The value of `impl` with which that way is taken; "table": Triton as it chooses itself."""
    if way in ("eager", "table"):
        yield "eager" if way == "eager" else "triton"
    else:
        with dispatch.forced(way):
            yield "triton"


def make(n: int, v: int, d: int, dtype: torch.dtype, spread: float = 2.0, **options: Any) -> Case:
    g = torch.Generator(DEVICE).manual_seed(n + v + d)
    hidden = torch.randn(n, d, generator=g, device=DEVICE).to(dtype)
    weight = torch.empty(v, d, dtype=dtype, device=DEVICE).normal_(0, spread / math.sqrt(d), generator=g)
    targets = torch.randint(v, (n,), generator=g, device=DEVICE)
    targets[-1:], targets[:1] = 0, v - 1
    if options.get("bias"):
        options["bias"] = torch.linspace(-1, 2, v, device=DEVICE).to(dtype)
    return Case(hidden, weight, targets, options)


def upstream(n: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 2, n, device=DEVICE), torch.linspace(1, -0.5, n, device=DEVICE)


def true(case: Case, *, entropy: bool = False, gradients: bool = True) -> Truth:
    exact = case.map(lambda x: x.detach().double().requires_grad_(gradients))
    (n, _), v = case.hidden.shape, case.weight.shape[0]
    ups = upstream(n)
    bias, scale = exact.options.get("bias"), exact.options.get("logit_scale", 1.0)
    cap, temperature = exact.options.get("softcap"), exact.options.get("temperature", 1.0)
    parts, size = [], max(1, ELEMENTS // v)
    with torch.set_grad_enabled(gradients):
        for start in range(0, max(1, n), size):
            rows = slice(start, start + size)
            z = exact.hidden[rows] @ exact.weight.T
            z = (z if bias is None else z + bias) * scale
            z = (z if cap is None else cap * torch.tanh(z / cap)) / temperature
            log_p = torch.log_softmax(z, -1)
            logp = log_p.gather(1, case.targets[rows, None])[:, 0]
            h = -torch.special.xlogy(p := log_p.exp(), p).sum(1) if entropy else torch.zeros_like(logp)
            if gradients:
                ((logp * ups[0][rows]).sum() + (h * ups[1][rows]).sum()).backward()
            parts.append((logp.detach(), torch.logsumexp(z.detach(), -1), h.detach()))
    logp, lse, h = map(torch.cat, zip(*parts, strict=True))
    return Truth(logp, lse, h, [x.grad for x in exact.leaves if x.grad is not None])


@functools.lru_cache(maxsize=1)
def known(shape: tuple[int, int, int], dtype: torch.dtype, name: str, entropy: bool) -> tuple[Case, Truth]:
    """A case and its truth, which the ways to compute it share."""
    case = make(*shape, dtype, **OPTIONS[name])
    return case, true(case, entropy=entropy)


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm, rows at a time: float64 copies of a weight are large."""
    size = max(1, ELEMENTS // max(1, want[:1].numel()))
    pairs = zip(got.split(size), want.split(size), strict=True)
    difference = sum((a.double() - b).square().sum().item() for a, b in pairs)
    return math.sqrt(difference / max(want.square().sum().item(), 1e-60))


def close(got: Tensor, want: Tensor, lse: Tensor) -> None:
    """Within 2e-5 nats; float32 cannot hold that where logits are in the hundreds."""
    largest = lse.abs().max().item() if lse.numel() else 0.0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5 * max(1.0, largest / 16))


def check(case: Case, truth: Truth, way: str, kind: str) -> None:
    ours = case.map(lambda x: x.detach().requires_grad_(kind != "frozen"))
    ours.hidden.requires_grad_()
    ups = upstream(case.hidden.shape[0])
    with using(way) as impl:
        out = linear_logp(
            ours.hidden, ours.weight, ours.targets, entropy=kind == "entropy", impl=impl, **ours.options
        )  # fmt: skip
        loss = (out.logp * ups[0]).sum()
        if out.entropy is not None:
            loss = loss + (out.entropy * ups[1]).sum()
        loss.backward()
    assert out.logp.dtype == out.lse.dtype == FP32
    close(out.logp, truth.logp, truth.lse)
    close(out.lse, truth.lse, truth.lse)
    if out.entropy is not None:
        close(out.entropy, truth.entropy, truth.lse)
    leaves = [leaf for leaf in ours.leaves if leaf.requires_grad]
    for leaf, want in zip(leaves, truth.gradients, strict=kind != "frozen"):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert error(leaf.grad, want) <= GRADIENT[case.hidden.dtype], f"gradient {list(leaf.shape)}"


@pytest.mark.parametrize(
    ("shape", "dtype", "way"), [(s, t, way) for s in SHAPES for t in WAYS for way in WAYS[t]], ids=str
)
def test_values_and_gradients_at_real_shapes(shape: tuple[int, int, int], dtype: torch.dtype, way: str) -> None:
    case, truth = known(shape, dtype, "plain", False)
    check(case, truth, way, "trained")
    check(case, truth, way, "frozen")


@pytest.mark.parametrize(
    ("name", "dtype", "kind", "way"),
    [(o, t, k, way) for o in OPTIONS for t in WAYS if t == BF16 or o == "all" for k in KINDS for way in WAYS[t]],
    ids=str,
)
def test_every_option(name: str, dtype: torch.dtype, kind: str, way: str) -> None:
    case, truth = known(SHAPES[1], dtype, name, kind == "entropy")
    check(case, truth, way, kind)


@pytest.mark.parametrize(("kind", "way"), [(k, way) for k in KINDS for way in WAYS[BF16]], ids=str)
def test_every_option_over_many_splits(kind: str, way: str) -> None:
    case, truth = known(SHAPES[2], BF16, "all", kind == "entropy")
    check(case, truth, way, kind)


@pytest.mark.parametrize("n", [0, 1, 2, 127, 128, 129, 2047, 2049, 4097, 65536])
def test_any_number_of_rows(n: int) -> None:
    case = make(n, 4001, 72, BF16)
    truth = true(case)
    for way in WAYS[BF16]:
        check(case, truth, way, "trained")
        check(case, truth, way, "frozen")


@pytest.mark.parametrize("d", [8448, 8202])
def test_a_weight_of_more_than_two_to_the_31_elements(d: int) -> None:
    """Rows copied by descriptor, and rows of no whole 16 bytes, read by pointers."""
    case = make(33, 262144, d, BF16, spread=0.5)
    case.targets.copy_(torch.arange(262143, 262143 - 33 * 5, -5))
    truth = true(case)
    for way in WAYS[BF16]:
        check(case, truth, way, "trained")
        check(case, truth, way, "frozen")


LAYOUTS = {
    "width of no whole 16 bytes": lambda c: c._replace(
        hidden=c.hidden[:, :70].clone(), weight=c.weight[:, :70].clone()
    ),
    "hidden states off alignment": lambda c: c._replace(hidden=c.hidden[:, 3:75], weight=c.weight[:, :72].clone()),
    "weight off alignment": lambda c: c._replace(hidden=c.hidden[:, :72].clone(), weight=c.weight[:, 5:77]),
    "rows apart": lambda c: c._replace(hidden=c.hidden[::2], weight=c.weight[1::3], targets=c.targets[::2] % 1333),
    "one row over and over": lambda c: c._replace(hidden=c.hidden[:1].expand(300, 80)),
    "transposed weight": lambda c: c._replace(weight=c.weight.T.contiguous().T),
    "transposed hidden states": lambda c: c._replace(hidden=c.hidden.T.contiguous().T),
    "short integers": lambda c: c._replace(targets=c.targets.int()),
}


@pytest.mark.parametrize(
    ("layout", "way"),
    [(x, way) for x in LAYOUTS for way in ("table", *WAYS[BF16]) if way != "tiled" or not x.startswith("transposed")],
)
def test_layouts(layout: str, way: str) -> None:
    case = LAYOUTS[layout](make(300, 4001, 80, BF16))
    truth = true(case._replace(targets=case.targets.long()))
    check(case, truth, way, "trained")
    check(case, truth, way, "frozen")


@pytest.mark.parametrize("way", WAYS[BF16])
def test_bf16_log_ratios_of_512_tokens_are_true_to_a_thousandth_nat(way: str) -> None:
    length, case = 512, make(4096, 32768, 1024, BF16, spread=1.0)
    rows = case.weight[case.targets].float()
    lead = rows * 17 / rows.norm(dim=1, keepdim=True) ** 2  # of the target, as of a trained model
    base = case.hidden.float() * 3.2 + lead
    reference = case._replace(hidden=base.to(BF16))
    for change in (0.002, 0.02):
        policy = Case(
            (base + change * 3.2 * torch.randn_like(base)).to(BF16),
            (case.weight.float() + change * torch.randn_like(case.weight.float()) / 32).to(BF16),
            case.targets,
            {},
        )
        offsets = torch.arange(0, 4097, length, device=DEVICE)
        truth = (true(policy, gradients=False).logp - true(reference, gradients=False).logp).view(-1, length).sum(1)
        with using(way) as impl:
            logps = [linear_logp(*x[:3], impl=impl).logp for x in (policy, reference)]
            found = seq_logratio(*logps, offsets, impl=impl).logratio
        assert truth.abs().max() > 0.01
        assert (found.double() - truth).abs().max() < 1e-3


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("way", WAYS[BF16])
def test_policy_that_equals_its_reference_gives_exactly_zero(way: str, softcap: float | None) -> None:
    n = 4096
    hidden, weight, targets, _ = make(n, 50257, 768, BF16)
    other = make(n, 50257, 768, BF16, spread=1.0)
    order = torch.randperm(n, device=DEVICE)
    trained = (hidden.clone().requires_grad_(), weight.clone().requires_grad_(), targets)
    with using(way) as impl:
        call = functools.partial(linear_logp, softcap=softcap, impl=impl)
        reference = torch.no_grad()(call)(hidden, weight, targets)
        heads = [Head(hidden, weight, softcap=softcap), Head(other.hidden, other.weight, softcap=softcap)]
        both = linear_logp_multi(heads, targets, impl=impl)
        passes = {
            "again": call(hidden, weight, targets),
            "trained": call(*trained),
            "frozen": call(trained[0], weight, targets),
            "with entropy": call(*trained, entropy=True),
            "first of two": both[0],
            "second of two": linear_logp_multi(heads[::-1], targets, impl=impl)[1],
            "two with entropy": linear_logp_multi(heads, targets, entropy=True, impl=impl)[0],
        }
        assert torch.equal(both[1].logp, call(other.hidden, other.weight, targets).logp)
        permuted = call(hidden[order], weight, targets[order])
        parts = [slice(5, 6), slice(100, 229)]
        alone = [call(hidden[part], weight, targets[part]) for part in parts]
    offsets = torch.tensor([0, 0, 1000, n], device=DEVICE)
    for name, out in passes.items():
        assert torch.equal(out.logp, reference.logp), name
        assert torch.equal(out.lse, reference.lse), name
        assert seq_logratio(out.logp, reference.logp, offsets).logratio.tolist() == [0.0] * 3
    assert torch.equal(permuted.logp, reference.logp[order])
    for part, out in zip(parts, alone, strict=True):
        assert torch.equal(out.logp, reference.logp[part]) or way != "tiled", (
            "in any batch, where no library multiplies"
        )
        close(out.logp, reference.logp[part].double(), reference.lse[part])
