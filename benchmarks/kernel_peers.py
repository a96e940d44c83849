"""The implementations that the kernel benchmarks compare, each as one function, and the passes that they run.

A library is imported when its implementation is loaded, so that an absent one is only reported.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from halos_kernels import linear_logp
from halos_kernels.dispatch import forced
from torch import Tensor

from benchmarks.kernel_problem import Logp, Problem, Result

PASSES = ("forward", "forward+backward", "frozen")
PRODUCTS = {"forward": 1, "forward+backward": 4, "frozen": 2}
"""Matrix products of 2·N·d·V operations that a pass without stored logits needs; frozen: no gradient of the weight."""


class Cannot(Exception):
    """An implementation lacks what was asked for; says why."""


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Args:
        load: imports it and gives the function; ImportError or AttributeError: it is not installed.
        cuda: whether it needs a GPU.
        around: context of each of its passes.
        total: it only has a right gradient for the sum of all tokens; its function gives that sum, of shape [].
    """

    load: Callable[[], Logp]
    cuda: bool = False
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    total: bool = False

    def run(self, logp: Logp, problem: Problem, what: str) -> Result:
        """One pass of its loaded function."""
        hidden = problem.hidden.detach().requires_grad_(what != "forward")
        weight = problem.weight.detach().requires_grad_(what == "forward+backward")
        if self.total and what == "forward":
            raise Cannot("gives the sum of all tokens only")
        with self.around(), torch.set_grad_enabled(what != "forward"):
            out = logp(hidden, weight, problem.targets)
            if out.shape != (() if self.total else problem.targets.shape):
                raise Cannot(f"gives the shape {list(out.shape)}, not a number for each token")
            if what == "forward":
                return Result(out, None, None)
            if not out.requires_grad:
                raise Cannot("has no gradient")
            inputs = [x for x in (hidden, weight) if x.requires_grad]
            upstream = None if self.total else problem.upstream.to(out.dtype)
            grads = torch.autograd.grad(out, inputs, upstream)
        return Result(None if self.total else out.detach(), grads[0], grads[1] if len(grads) > 1 else None)


def _naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once, in the inputs' dtype; log-softmax in float32."""
    return F.log_softmax((hidden @ weight.t()).float(), -1).gather(1, targets[:, None])[:, 0]


def _load_ours(impl: str) -> Logp:
    return lambda hidden, weight, targets: linear_logp(hidden, weight, targets, impl=impl).logp


def _load_torch() -> Logp:
    fused: Any = F.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: -fused(hidden, weight, targets, reduction="none", options=options)


def _load_trl() -> Logp:
    function: Any = import_module("trl.kernels").ChunkedLogProbFunction
    chunk = 32768  # of the vocabulary, as its trainers have it

    def logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        outputs = function.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ())
        return outputs[0]

    return logp


def _load_liger(reduction: str) -> Logp:
    fused = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda hidden, weight, targets: -fused(hidden, weight, targets, reduction=reduction)


def _load_cce() -> Logp:
    fused = import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, targets: -fused(hidden, weight, targets, reduction="none")


PEERS = {
    "naive": Peer(lambda: _naive),
    "ours": Peer(partial(_load_ours, "auto")),
    "ours-tiled": Peer(partial(_load_ours, "triton"), cuda=True, around=partial(forced, "tiled")),
    "ours-chunked": Peer(partial(_load_ours, "triton"), cuda=True, around=partial(forced, "chunked")),
    "ours-eager": Peer(partial(_load_ours, "eager"), cuda=True),  # without a GPU it is what "ours" is
    "torch": Peer(_load_torch),
    "trl": Peer(_load_trl),
    "liger": Peer(partial(_load_liger, "none"), cuda=True),
    "liger-sum": Peer(partial(_load_liger, "sum"), cuda=True, total=True),
    "cce": Peer(_load_cce, cuda=True),
}

OURS = tuple(name for name in PEERS if name.startswith("ours"))


def load_peer(name: str, device: str) -> Logp:
    """The function of a known implementation, or `Cannot`."""
    try:
        logp = PEERS[name].load()
    except (ImportError, AttributeError) as error:
        if name in OURS:
            raise
        raise Cannot(f"not installed ({error})") from error
    if PEERS[name].cuda and device != "cuda":
        raise Cannot("needs a GPU")
    return logp


def told(error: Exception) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {str(error).strip()[:200]}".splitlines()[0]
