"""What the kernel benchmarks compute: seeded output layers, and their answers in float64."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SEQUENCE = 512  # tokens of a log-ratio
LOGIT_STD, TARGET_LOGIT = 3.2, 17.0  # of a trained model's head, roughly: log-probabilities near -1
CHUNK = 4096  # vocabulary of one float64 product
ROWS, COLUMNS = 128, 256  # whose gradients are compared; columns twice: of targets, and any

Logp = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states [N, d], weight [V, d], targets [N] -> log-probabilities [N]."""


@dataclass(frozen=True)
class Shape:
    """Scored tokens, width of the hidden states, vocabulary."""

    tokens: int
    width: int
    vocabulary: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        parts = text.split(",")
        if len(parts) != 3 or not all(x.strip().isdecimal() and int(x) > 0 for x in parts):
            form = "give N,d,V (tokens, width, vocabulary): three positive integers such as 683,512,32000"
            raise argparse.ArgumentTypeError(f"{text!r}: {form}")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.tokens},{self.width},{self.vocabulary}"


@dataclass(frozen=True)
class Problem:
    """One output layer with its inputs, and the gradient that arrives at each log-probability."""

    hidden: Tensor  # [N, d]
    weight: Tensor  # [V, d]
    targets: Tensor  # [N]
    upstream: Tensor  # [N] float32


class Result(NamedTuple):
    """What an implementation computed of a problem; None: not part of its pass."""

    logp: Tensor | None  # [N]
    hidden_grad: Tensor | None  # [N, d]
    weight_grad: Tensor | None  # [V, d]


@dataclass(frozen=True)
class Truth:
    """A problem's answers in float64: all log-probabilities, some rows of both gradients."""

    logp: Tensor  # [N]
    rows: Tensor
    hidden_grad: Tensor  # [rows, d]
    columns: Tensor
    weight_grad: Tensor  # [columns, d]


@dataclass(frozen=True)
class Heads:
    """A reference and a policy near it, with their float64 log-probabilities."""

    reference: Problem
    policy: Problem
    truth: tuple[Tensor, Tensor]  # reference's, policy's [N]


def make_problem(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Problem:
    draw = torch.Generator(device).manual_seed(seed)
    size = (shape.vocabulary, shape.width)
    weight = torch.randn(size, generator=draw, device=device).div_(math.sqrt(shape.width)).to(dtype)
    targets = torch.randint(0, shape.vocabulary, (shape.tokens,), generator=draw, device=device)
    toward = weight[targets].float()
    hidden = torch.randn(shape.tokens, shape.width, generator=draw, device=device).mul_(LOGIT_STD)
    hidden += toward * (TARGET_LOGIT / toward.square().sum(1, keepdim=True))
    upstream = torch.randn(shape.tokens, generator=draw, device=device)
    return Problem(hidden.to(dtype), weight, targets, upstream)


def make_heads(reference: Problem, perturbation: float, seed: int) -> Heads:
    """The policy is the reference with noise on hidden states and weight, `perturbation` of their own spread."""
    draw = torch.Generator(reference.hidden.device).manual_seed(seed + 1)

    def noisy(x: Tensor, spread: float) -> Tensor:
        noise = torch.randn(x.shape, generator=draw, device=x.device).mul_(perturbation * spread)
        return noise.add_(x).to(x.dtype)

    width = reference.hidden.shape[1]
    hidden, weight = noisy(reference.hidden, LOGIT_STD), noisy(reference.weight, 1 / math.sqrt(width))
    policy = replace(reference, hidden=hidden, weight=weight)
    return Heads(reference, policy, (logp64(reference)[0], logp64(policy)[0]))


def logp64(problem: Problem) -> tuple[Tensor, Tensor]:
    """Log-probabilities and log-sum-exp [N] in float64, one chunk of the vocabulary after another."""
    hidden = problem.hidden.double()
    lse = torch.full(problem.targets.shape, -math.inf, dtype=torch.float64, device=hidden.device)
    for w in problem.weight.split(CHUNK):
        lse = torch.logaddexp(lse, (hidden @ w.double().t()).logsumexp(1))
    return (hidden * problem.weight[problem.targets].double()).sum(1) - lse, lse


def truth64(problem: Problem) -> Truth:
    """∂logp/∂z = 1[target] − softmax(z), and what follows for the chosen rows of both gradients."""
    logp, lse = logp64(problem)
    hidden, targets, upstream = problem.hidden.double(), problem.targets, problem.upstream.double()
    draw = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(targets), generator=draw)[:ROWS].to(targets.device)
    drawn = torch.randint(0, len(problem.weight), (COLUMNS,), generator=draw).to(targets.device)
    columns = torch.cat([targets[:COLUMNS], drawn]).unique()
    hidden_grad = problem.weight[targets[rows]].double()
    for w in problem.weight.split(CHUNK):
        w64 = w.double()
        hidden_grad -= (hidden[rows] @ w64.t() - lse[rows, None]).exp() @ w64
    hidden_grad *= upstream[rows, None]
    softmax = (hidden @ problem.weight[columns].double().t() - lse[:, None]).exp()
    dz = ((targets[:, None] == columns).double() - softmax) * upstream[:, None]
    return Truth(logp, rows, hidden_grad, columns, dz.t() @ hidden)


def errors(truth: Truth, result: Result) -> dict[str, float]:
    """Largest absolute error of the log-probabilities, and relative error (of norms) of each gradient."""
    found = {}
    if result.logp is not None:
        found["logp"] = (result.logp.double() - truth.logp).abs().max().item()
    if result.hidden_grad is not None:
        found["hidden_grad"] = _relative(result.hidden_grad[truth.rows], truth.hidden_grad)
    if result.weight_grad is not None:
        found["weight_grad"] = _relative(result.weight_grad[truth.columns], truth.weight_grad)
    return found


def _relative(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def logratios(reference: Tensor, policy: Tensor, length: int) -> Tensor:
    """Policy − reference of each sequence, summed in float64."""
    return (policy.double() - reference.double()).view(-1, length).sum(1)


def logratio_errors(heads: Heads, logp: Logp, length: int) -> dict[str, float]:
    """Root mean square errors in nats: of the policy's tokens, and of the log-ratios of `length` tokens."""
    with torch.no_grad():
        reference, policy = (logp(x.hidden, x.weight, x.targets) for x in (heads.reference, heads.policy))
    ratio = logratios(reference, policy, length) - logratios(*heads.truth, length)
    return {"token_rms": _rms(policy.double() - heads.truth[1]), "logratio_rms": _rms(ratio)}


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
