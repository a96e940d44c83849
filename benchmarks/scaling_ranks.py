"""One rank of `benchmarks.scaling`: a training step of KTO under FSDP2, its bytes counted from tensors and collectives.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.scaling_ranks JOBS.json OUT.json
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from halos_pl.batch import Sequences
from halos_pl.models import ModelSource, enable_checkpointing
from halos_pl.scoring import Scorer, score_both

KINDS = {
    "all_gather": ("all_gather_single", "all_gather_into_tensor"),  # FSDP2 of torch 2.13 and later, and before
    "reduce_scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
    "all_reduce": ("all_reduce",),
}
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class Counter:
    """Bytes that this rank sends in a ring, counted from what the collectives are handed."""

    def __init__(self) -> None:
        self.sent: dict[str, int] = {}
        self.collectives: dict[str, int] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        real = {name: getattr(dist, name) for names in KINDS.values() for name in names if hasattr(dist, name)}
        try:
            for kind, names in KINDS.items():
                for name in set(names) & set(real):
                    setattr(dist, name, self._counted(kind, real[name]))
            yield
        finally:
            for name, function in real.items():
                setattr(dist, name, function)

    def _counted(self, kind: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            ranks = dist.get_world_size(kwargs.get("group"))
            size = max(x.numel() * x.element_size() for x in tensors)  # the whole, not the shard
            times = 2 if kind == "all_reduce" else 1
            self.sent[kind] = self.sent.get(kind, 0) + times * size * (ranks - 1) // ranks
            self.collectives[kind] = self.collectives.get(kind, 0) + 1
            return function(*args, **kwargs)

        return call


def build(job: dict[str, Any]) -> tuple[Scorer, Scorer]:
    """Policy and reference, not sharded yet."""
    torch.manual_seed(0)
    config = ModelSource(config=job["config"]).pretrained_config
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    reference = Scorer(copy.deepcopy(lm)).requires_grad_(False).eval()
    if job["checkpointing"]:
        enable_checkpointing(lm)
    if job["lora"]:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=job["lora"], target_modules="all-linear"), lm)
        if job["checkpointing"]:
            lm.enable_input_require_grads()
    return Scorer(lm), reference


def shard(scorer: Scorer, mesh: DeviceMesh) -> None:
    layers: nn.ModuleList = scorer.lm.base_model.layers  # type: ignore[assignment]
    for module in (*layers, scorer):
        fully_shard(module, mesh=mesh, mp_policy=POLICY, reshard_after_forward=True)


def rows(job: dict[str, Any], device: str) -> Sequences:
    """Rows of random tokens, the last `scored` of each of them completion."""
    count, length, scored = job["rows"], job["length"], job["scored"]
    ids = torch.randint(0, job["config"]["vocab_size"], (count, length))
    predictors = torch.arange(count * length).view(count, length)[:, length - scored :].flatten()
    cuts = torch.arange(0, count * scored + 1, scored)
    return Sequences((ids,), predictors, ids.flatten()[predictors], cuts, count * length).to(device)


def step(policy: Scorer, reference: Scorer, optimizer: torch.optim.Optimizer, job: dict[str, Any], device: str) -> int:
    """One optimizer step; returns the bytes of whole gradients between its micro-batches."""
    between = 0
    for k in range(job["accumulate"]):
        last = k + 1 == job["accumulate"]
        if isinstance(policy, FSDPModule):
            policy.set_requires_gradient_sync(last)
        batch = rows(job, device)
        with torch.no_grad():
            score_both(policy, reference, batch)
        own, frozen = score_both(policy, reference, batch)
        (frozen.logp - own.logp).sum().backward()
        if not last:
            between = _whole_gradients(policy)
    optimizer.step()
    return between


def _whole_gradients(policy: nn.Module) -> int:
    states = [x._get_fsdp_state() for x in policy.modules() if isinstance(x, FSDPModule)]
    params = [p for x in states for group in x._fsdp_param_groups for p in group.fsdp_params]
    held = [p.unsharded_accumulated_grad for p in params]
    return sum(x.numel() * x.element_size() for x in held if x is not None)


def local_bytes(tensors: Iterator[Tensor | None]) -> int:
    found = [getattr(x, "_local_tensor", x) for x in tensors if x is not None]
    return sum(x.numel() * x.element_size() for x in found)


@contextmanager
def allocated(device: str, out: dict[str, int]) -> Iterator[None]:
    """The most that the allocator held above the start, in bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        torch.cuda.synchronize()
        out["peak"] = torch.cuda.max_memory_allocated() - before
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        yield
    events = [x for x in found.profiler.kineto_results.events() if x.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    out["peak"] = most


def measure(job: dict[str, Any], device: str) -> dict[str, Any]:
    """Steps after the first: what is held after one, what it sent, and its least peak of three above what stays."""
    policy, reference = build(job)
    for model in (policy, reference):
        model.to(device)
    if dist.is_initialized():
        world, width = dist.get_world_size(), job["shard"]
        names = ("replicate", "shard")[-2 if width < world else -1 :]
        mesh = init_device_mesh(device, (world // width, width) if width < world else (world,), mesh_dim_names=names)
        shard(policy, mesh)
        shard(reference, mesh)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], foreach=False)
    step(policy, reference, optimizer, job, device)
    peaks = []
    for _ in range(job.get("repeats", 3)):
        optimizer.zero_grad()
        gc.collect()
        counter, out = Counter(), {}
        with counter.counting(), allocated(device, out):
            between = step(policy, reference, optimizer, job, device)
        peaks.append(out["peak"])
    states = (x for state in optimizer.state.values() for x in state.values() if x.dim())
    return {
        "weights": local_bytes(iter(policy.parameters())),
        "reference": local_bytes(iter(reference.parameters())),
        "gradients": local_bytes(p.grad for p in policy.parameters()),
        "optimizer": local_bytes(states),
        "accumulated": between,
        "sent": counter.sent,
        "collectives": counter.collectives,
        "peak": min(peaks),
        "peaks": peaks,
    }


def main(jobs: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = [measure(job, "cpu") for job in json.loads(Path(jobs).read_text(encoding="utf-8"))]
    if dist.get_rank() == 0:  # it holds the most of every parameter
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
