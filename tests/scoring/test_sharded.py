"""Scoring under FSDP2 on two ranks against the same models whole in one process. One launch for all tests."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

WORKER = Path(__file__).with_name("sharded_worker.py")
WORK = runpy.run_path(str(WORKER))
Results = dict[str, Any]
Ranks = tuple[Results, Results]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of the two ranks found."""
    out = tmp_path_factory.mktemp("sharded")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([*launch, str(out)], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-4000:]
    return tuple(torch.load(out / f"rank{r}.pt", weights_only=True) for r in (0, 1))


def same(ours: Any, truth: Any) -> None:
    torch.testing.assert_close(ours, truth, atol=1e-10, rtol=0)


def step_alone(kind: str) -> Results:
    found: Results = WORK["one_step"](*WORK["pair"](kind), (0, 1))
    return found


def scores_alone(kind: str, rank: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = WORK["score"](*WORK["pair"](kind), WORK["make_rows"](rank, 0))
    return found


def grads_of_sums_alone() -> dict[str, Tensor]:
    policy, _ = WORK["pair"]("untied")
    sums = [policy(WORK["make_rows"](rank, 0)).logp.sum() for rank in (0, 1)]
    torch.stack(sums).mean().backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", WORK["MODELS"])
def test_a_step_is_that_of_whole_models(kind: str, ranks: Ranks) -> None:
    alone = step_alone(kind)
    head = "lm.transformer.wte.weight" if kind == "tied" else "lm.lm_head.weight"
    assert alone["grads"][head].abs().max() > 1e-3
    assert alone["z0"] > 0, "a z0 of 0 would hide whose rows it is of"
    assert ("lm.lm_head.bias" in alone["grads"]) == (kind == "bias")
    for r, found in enumerate(rank[kind] for rank in ranks):
        same(found["z0"], alone["z0"])
        same(found["grads"], alone["grads"])
        for name in ("start", "logratios", "between", "after"):
            same(found[name], [alone[name][r]])
        assert (found["after"][0] - found["between"][0]).abs().max() > 1e-2, "an update that stale weights would hide"
        assert found["operators"] == ["linear_logp", "linear_logp"], "reference and policy"
        assert found["sharded after"]


def test_a_frozen_head_passes_the_gradient_on(ranks: Ranks) -> None:
    """The truth is of a head that is trained, and thus of the other operator."""
    alone = step_alone("untied")
    del alone["grads"]["lm.lm_head.weight"]
    hidden = sorted(alone["hidden grads"], key=len, reverse=True)  # the backward's order is not the ranks'
    hidden = [grad * 2 for grad in hidden]  # of each rank's own mean, not of the mean of both
    for r, found in enumerate(rank["frozen"] for rank in ranks):
        assert found["operators"] == ["linear_logp", "linear_logp_frozen"], "reference and policy"
        same(found["grads"], alone["grads"])
        same(found["hidden grads"], [hidden[r]])
        assert hidden[r].abs().max() > 1e-3


@pytest.mark.parametrize("sharded", ["both", "policy", "reference"])
def test_both_heads_are_whole_in_one_call(sharded: str, ranks: Ranks) -> None:
    for r, rank in enumerate(ranks):
        found, truth = rank["values"][sharded], scores_alone("untied", r)
        same(found["values"], truth)
        assert found["calls"] == [[(False, [WORK["V"], 16], True)] * 2], "one call, of two plain whole weights"
        assert (truth["policy logp"] - truth["reference logp"]).abs().max() > 0.1
        assert found["sharded after"]


def test_a_model_differs_from_itself_by_exactly_0(ranks: Ranks) -> None:
    for rank in ranks:
        assert set(rank["itself"].values()) == {0.0}, rank["itself"]


def test_inference_mode(ranks: Ranks) -> None:
    alone = grads_of_sums_alone()
    for r, found in enumerate(rank["inference"] for rank in ranks):
        truth = scores_alone("untied", r)
        for name in ("first", "between backwards"):
            same(found[name], {key: truth[key] for key in found[name]})
            assert found[f"{name}, sharded after"]
        same(found["grads"], alone)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weight", "weight must be a plain tensor, got a DTensor"),
        ("bias", "bias must be a plain tensor, got a DTensor"),
        ("second weight", "heads[1]: weight must be a plain tensor, got a DTensor"),
        ("head that is a unit of its own", "weight must be a plain tensor, got a DTensor"),
    ],
)
def test_sharded_weights_are_refused_by_name(what: str, message: str, ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["refused"].get(what, "no error").startswith(f"ValueError: {message}")


def test_after_an_exception_all_can_be_sharded_and_scored_again(ranks: Ranks) -> None:
    """FSDP leaves weights whole where a forward raised, until `reshard` or the next forward."""
    for r, rank in enumerate(ranks):
        found = rank["interrupted"]
        assert found["raised"] == "inside"
        assert found["sharded by hand"]
        for name in ("by hand", "by the next call"):
            same(found[name]["values"], scores_alone("tied", r))
            assert found[name]["sharded after"]
