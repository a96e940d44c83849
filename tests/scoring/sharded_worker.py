"""What tests/scoring/test_sharded.py runs: alone in its own process, and sharded by FSDP2 on each of two ranks.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/scoring/sharded_worker.py OUT
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from halos_kernels import Head, linear_logp, linear_logp_multi, ops
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from halos_pl.batch import CompletionLogps, Sequences
from halos_pl.data.collate import sequences
from halos_pl.losses import KTO
from halos_pl.models import ModelSource, load_model
from halos_pl.scoring import Scorer, compare, reference_point, score_both, scorer

V = 61  # odd: the ranks' shares of the head differ
TOKENS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
PHI = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "tied": GPT2,
    "untied": GPT2 | {"tie_word_embeddings": False},
    "bias": PHI | {"model_type": "phi"},  # of the head
}
LENGTHS = (
    [(2, 5), (7, 1), (1, 9), (4, 4)],  # tokens of prompt and completion: four rows on rank 0,
    [(3, 6), (8, 2)],  # two on rank 1
)
OBJECTIVE = KTO(beta=0.5, undesirable_weight=1.5)
Results = dict[str, Any]
Shard = Callable[[Scorer], Scorer]


def build(kind: str, seed: int, dtype: str = "float64") -> Scorer:
    """Random weights, far enough from one another that every part of them shows in the log-probabilities."""
    lm = load_model(ModelSource(config=TOKENS | MODELS[kind], dtype=dtype, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return Scorer(lm)


def pair(kind: str) -> tuple[Scorer, Scorer]:
    """A policy and a frozen reference of other weights."""
    return build(kind, 0), build(kind, 1).requires_grad_(False)


def make_rows(rank: int, seed: int) -> Sequences:
    """In two blocks, so that one forward of the root takes two of its backbone."""
    generator = torch.Generator().manual_seed(10 * seed + rank)
    tokens = [[torch.randint(3, V, (n,), generator=generator).numpy() for n in row] for row in LENGTHS[rank]]
    return sequences([(x, y) for x, y in tokens], pad_id=0, vocab_size=V, length_groups=2)


def freeze_head(model: Scorer) -> Scorer:
    model.lm.get_output_embeddings().weight.requires_grad_(False)
    return model


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def is_sharded(*models: Scorer) -> bool:
    return all(isinstance(p, DTensor) for model in models for p in model.parameters())


# ---------------------------------------------------------------------------------------------- alone or sharded


def score(policy: Scorer, reference: Scorer, rows: Sequences) -> dict[str, Tensor]:
    """All that `score_both` says of the rows without gradients."""
    with torch.no_grad():
        outs = score_both(policy, reference, rows, entropy=True)
    fields = {"policy": outs[0]._asdict(), "reference": outs[1]._asdict()}
    return {f"{who} {name}": value for who, out in fields.items() for name, value in out.items()}


def one_step(policy: Scorer, reference: Scorer, ranks: tuple[int, ...]) -> Results:
    """A step of KTO as the module takes it: z0 without gradients, the loss, its gradient, the update.

    Args:
        policy: gets the gradients and the update.
        reference: frozen.
        ranks: whose rows; the loss is the mean of the ranks' means, as FSDP averages it.
    """
    rows, mismatched = ([make_rows(rank, seed) for rank in ranks] for seed in (0, 32))  # 32: z0 > 0 for every model

    def apart() -> list[Tensor]:
        with torch.no_grad():
            return [compare(*score_both(policy, reference, m), m).logratio for m in mismatched]

    def loss(scores: CompletionLogps) -> Tensor:
        desirable = torch.arange(len(scores.logp)) % 2 == 0
        return OBJECTIVE.losses(scores, desirable, z0).mean()

    start = apart()
    z0 = reference_point(torch.cat(start))
    with watch_ops() as seen:
        scored = [compare(*score_both(policy, reference, r), r) for r in rows]
    torch.stack([loss(scores) for scores in scored]).mean().backward()
    grads = {name: whole(p.grad) for name, p in policy.named_parameters() if p.grad is not None}
    between = apart()
    torch.optim.SGD(policy.parameters(), lr=0.5).step()
    return {
        "start": start,
        "z0": z0,
        "logratios": [scores.logratio.detach() for scores in scored],
        "operators": seen["operators"],
        "hidden grads": seen["hidden grads"],
        "grads": grads,
        "between": between,
        "after": apart(),
    }


@contextmanager
def watch_ops() -> Iterator[dict[str, list[Any]]]:
    """Names of the operators called, and the gradient that each hands to its hidden states."""
    seen: dict[str, list[Any]] = {"operators": [], "hidden grads": []}

    def spy(name: str) -> Callable[..., Any]:
        real = getattr(ops, name)

        def call(hidden: Tensor, *args: Any) -> Any:
            seen["operators"].append(name)
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: seen["hidden grads"].append(grad.clone()))
            return real(hidden, *args)

        return call

    with (
        patch.object(ops, "linear_logp", spy("linear_logp")),
        patch.object(ops, "linear_logp_frozen", spy("linear_logp_frozen")),
    ):
        yield seen


# ---------------------------------------------------------------------------------------------- sharded alone


@contextmanager
def watch_heads() -> Iterator[list[list[tuple[bool, list[int], bool]]]]:
    """Of each call that `score_both` makes: each head's weight is a DTensor, its shape, its storage is filled."""
    calls: list[list[tuple[bool, list[int], bool]]] = []

    def spy(heads: list[Head], *args: Any, **options: Any) -> Any:
        weights = [head.weight for head in heads]
        calls.append(
            [(isinstance(w, DTensor), list(w.shape), w.untyped_storage().nbytes() >= 8 * w.numel()) for w in weights]
        )
        return linear_logp_multi(heads, *args, **options)

    with patch.object(scorer, "linear_logp_multi", spy):
        yield calls


def values(shard: Shard, rank: int) -> Results:
    """`score_both` with one or both of the models sharded."""
    rows, found = make_rows(rank, 0), {}
    for name in ("both", "policy", "reference"):
        policy, reference = pair("untied")
        sharded = {"both": (policy, reference), "policy": (policy,), "reference": (reference,)}[name]
        for model in sharded:
            shard(model)
        with watch_heads() as calls:
            out = score(policy, reference, rows)
        found[name] = {"values": out, "calls": calls, "sharded after": is_sharded(*sharded)}
    return found


def itself(shard: Shard, rank: int) -> dict[str, float]:
    """Largest difference of a model's log-probabilities from its own."""
    rows, found = make_rows(rank, 0), {}

    def differ(name: str, policy: Scorer, reference: Scorer) -> None:
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                first, second = score_both(policy, reference, rows)
            found[f"{name}, {'with' if grad else 'without'} gradients"] = (first.logp - second.logp).abs().max().item()

    for dtype in ("float32", "float64"):
        differ(f"both sharded, {dtype}", shard(build("tied", 0, dtype)), shard(build("tied", 0, dtype)))
        differ(f"policy sharded, {dtype}", shard(build("tied", 0, dtype)), build("tied", 0, dtype))
    policy = shard(build("tied", 0))
    differ("one and the same policy", policy, policy)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    differ("mixed", *(make_shard(mp_policy=half)(build("tied", 0, "float32")) for _ in range(2)))
    return found


def inference(shard: Shard, rank: int) -> Results:
    """`score_both` under inference mode, before any other pass (then no training follows) and between two backwards."""
    rows, found = make_rows(rank, 0), {}
    for name in ("first", "between backwards"):
        policy, reference = map(shard, pair("untied"))
        if name != "first":
            policy(rows).logp.sum().backward()
        with torch.inference_mode():
            out = score_both(policy, reference, rows, entropy=True)
        found[name] = {"policy logp": out[0].logp.clone(), "reference logp": out[1].logp.clone()}
        found[f"{name}, sharded after"] = is_sharded(policy, reference)
        if name != "first":
            policy(rows).logp.sum().backward()
            found["grads"] = {name: whole(p.grad) / 2 for name, p in policy.named_parameters() if p.grad is not None}
    return found


def refused(shard: Shard, rank: int) -> dict[str, str]:
    """What is said to sharded weights."""
    rows, found = make_rows(rank, 0), {}
    hidden = torch.zeros(rows.num_scored, 16, dtype=torch.float64)
    sharded = shard(build("bias", 0)).lm.get_output_embeddings()
    plain = build("bias", 0).lm.get_output_embeddings()
    own_unit = build("untied", 0)
    fully_shard(own_unit.lm.get_output_embeddings(), mesh=init_device_mesh("cpu", (2,)))
    shard(own_unit)
    calls: dict[str, Callable[[], Any]] = {
        "weight": lambda: linear_logp(hidden, sharded.weight, rows.targets),
        "bias": lambda: linear_logp(hidden, plain.weight, rows.targets, bias=sharded.bias),
        "second weight": lambda: linear_logp_multi(
            [Head(hidden, plain.weight), Head(hidden, sharded.weight)], rows.targets
        ),
        "head that is a unit of its own": lambda: own_unit(rows),
    }
    for name, call in calls.items():
        try:
            call()
        except Exception as error:  # the test says which
            found[name] = f"{type(error).__name__}: {error}"
    return found


def interrupted(shard: Shard, rank: int) -> Results:
    """An exception while the weights of both are whole; then `reshard` by hand, or the next call."""
    policy, reference = map(shard, pair("tied"))
    rows, found = make_rows(rank, 0), {}
    for name in ("by hand", "by the next call"):
        with patch.object(scorer, "linear_logp_multi", side_effect=MemoryError("inside")):
            try:
                score(policy, reference, rows)
            except MemoryError as error:
                found["raised"] = str(error)
        if name == "by hand":
            for unit in (*policy.modules(), *reference.modules()):
                if isinstance(unit, FSDPModule):
                    unit.reshard()
            found["sharded by hand"] = is_sharded(policy, reference)
        found[name] = {"values": score(policy, reference, rows), "sharded after": is_sharded(policy, reference)}
    return found


def make_shard(**options: Any) -> Shard:
    """Each layer a unit, and the root with all else: embedding, last norm, head."""

    def shard(model: Scorer) -> Scorer:
        mesh = init_device_mesh("cpu", (2,))
        layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        for unit in (*layers, model):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, **options)
        return model

    return shard


def main(out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, shard = dist.get_rank(), make_shard()
    results: Results = {}
    for kind in MODELS:
        policy, reference = map(shard, pair(kind))
        results[kind] = one_step(policy, reference, (rank,)) | {"sharded after": is_sharded(policy, reference)}
    policy, reference = pair("untied")
    results["frozen"] = one_step(shard(freeze_head(policy)), shard(reference), (rank,))
    for part in (values, itself, inference, refused, interrupted):
        results[part.__name__] = part(shard, rank)
    torch.save(results, Path(out) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
