"""What tests/test_fsdp.py runs: alone in its own process, and under the strategy `fsdp` on every rank.

python -m torch.distributed.run --standalone --nproc-per-node RANKS tests/fsdp_worker.py FILES.json OUT WHAT [WHAT …]

The file is long because one launch serves all tests: cases, runs of code that is broken on purpose, and other parts.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups
from torch.distributed.tensor import DTensor

from halos_pl.accumulation import StepMean
from halos_pl.batch import Batch
from halos_pl.data import AlignmentData
from halos_pl.data.sources import Source
from halos_pl.evaluate import Evaluation
from halos_pl.fsdp import FSDP
from halos_pl.losses import BCO, DPO, KTO, SFT, Objective
from halos_pl.models import LoRA, ModelError, ModelSource
from halos_pl.module import AlignmentModule
from halos_pl.module import Evaluation as Evaluated
from halos_pl.parallel import local, sharding, whole
from halos_pl.scoring import Scorer, load_pair

STEPS, LR = 4, 0.05
Files = dict[str, str]
Results = dict[str, Any]


class Case(NamedTuple):
    """A run of 4 steps. With 7 rows, two ranks get 2 + 2 and 2 + 1 of them, four ranks 2 + 2 + 2 + 1 or fewer."""

    objective: Objective
    file: str = "thumbs"
    rows: int = 7
    batch: int = 2  # of a rank
    model: str = "tied"
    reference: str = "other"
    accumulate: int = 1
    reduce: str = "step"
    checkpointing: bool = False
    clip: float | None = None
    clip_by: str = "norm"
    length_groups: int = 1
    limit: int | float = 1.0
    replicas: int = 1
    dtype: str = "float64"
    held_out: bool = False  # also validate, sample and read text
    lora: bool = False  # with the policy, its adapters off, as the reference
    between: bool = False  # a pass without gradients between backward and optimizer step


UNEQUAL = KTO(beta=0.3, undesirable_weight=1.5)
CASES = {
    "kto": Case(UNEQUAL, held_out=True),
    "kto, a pass before the step": Case(UNEQUAL, between=True),
    "kto, untied, accumulated": Case(UNEQUAL, rows=11, model="untied", accumulate=2, clip=0.5),
    "kto, accumulated, reduced at once": Case(UNEQUAL, rows=11, accumulate=2, reduce="micro_batch", checkpointing=True),
    "kto, checkpointing, 3 groups of length": Case(UNEQUAL, model="untied", checkpointing=True, length_groups=3),
    "kto of a copy, clipped by value": Case(UNEQUAL, reference="copy", clip=0.01, clip_by="value"),
    "kto, one class a rank": Case(UNEQUAL, batch=1, rows=12, model="untied", accumulate=2, clip=0.05, clip_by="value"),
    "kto, limited": Case(UNEQUAL, rows=11, limit=2, accumulate=2, clip=1.0),
    "dpo": Case(DPO(beta=0.3), "pairs", model="untied", clip=0.5, held_out=True),
    "sft, accumulated": Case(SFT(), "pairs", rows=11, accumulate=2, clip=0.5, held_out=True),
    "bco, accumulated": Case(BCO(beta=0.3, undesirable_weight=1.5), rows=11, model="untied", accumulate=2),
    "kto, adapters": Case(UNEQUAL, rows=11, accumulate=2, clip=0.01, lora=True, checkpointing=True),
    "dpo, untied, adapters": Case(DPO(beta=0.3), "pairs", model="untied", lora=True),
}
REPLICAS = {  # four ranks
    "kto": Case(UNEQUAL, rows=15, accumulate=2, clip=0.5),
    "kto, two replicas": Case(UNEQUAL, rows=15, accumulate=2, clip=0.5, replicas=2),
    "kto, two replicas, reduced at once": Case(
        UNEQUAL, rows=15, accumulate=2, reduce="micro_batch", clip=0.01, clip_by="value", replicas=2, model="untied"
    ),
    "sft, four replicas": Case(SFT(), "pairs", rows=7, replicas=4, checkpointing=True),
}


def matrix(dtype: str) -> dict[str, Case]:
    """Everything with everything."""
    found = {}
    for model, accumulate, reduce, checkpointing, clip in itertools.product(
        ("tied", "untied"), (1, 2), ("step", "micro_batch"), (False, True), (None, "norm", "value")
    ):
        if accumulate > 1 or reduce == "step":
            bound = {None: None, "norm": 0.5, "value": 0.01}[clip]
            name = f"{dtype}, {model}, {accumulate} micro-batches, {reduce}, checkpointing={checkpointing}, {clip}"
            found[name] = Case(
                *(UNEQUAL, "thumbs", 11, 2, model, "other", accumulate, reduce, checkpointing, bound, clip or "norm"),
                dtype=dtype,
            )
    return found


MATRICES = {
    "cases": CASES,
    "replicas": REPLICAS,
    "float64": matrix("float64"),
    "float32": matrix("float32") | {name: case._replace(dtype="float32") for name, case in CASES.items()},
}


class Record(Logger):
    """Every logged row of training."""

    name, version = "record", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "train/loss" in metrics:
            self.rows.append({name: value for name, value in metrics.items() if name.startswith("train/")})

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class Watched(AlignmentModule):
    """Keeps what a run computes on its way."""

    def watch(self) -> None:
        self.z0: list[float | None] = []
        self.grads: list[dict[str, Tensor]] = []
        self.held: list[bool] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.last = batch
        return super().training_step(batch, batch_idx)

    def evaluate(self, batch: Batch) -> Evaluated:
        result = super().evaluate(batch)
        if self.training:
            self.z0.append(None if result.z0 is None else float(result.z0))
        return result

    def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
        if self.between:
            with torch.no_grad():
                self.score(self.last.completions)
        super().configure_gradient_clipping(*args, **options)
        assert self.policy is not None
        grads = {name: p.grad for name, p in self.policy.named_parameters() if p.grad is not None}
        self.grads.append({name.removeprefix("lm."): local(grad).clone() for name, grad in grads.items()})

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        models = [model for model in (self.policy, self.reference) if isinstance(model, torch.nn.Module)]
        self.held.append(all(isinstance(p, DTensor) for model in models for p in model.parameters()))


def make(case: Case, files: Files, factor: int = 1) -> tuple[Watched, AlignmentData]:
    """Module and data; one process that stands for several ranks gets the rows of all."""
    module = Watched(
        case.objective,
        policy=files[case.model],
        reference="copy"
        if case.reference == "copy" or case.lora or not case.objective.needs_reference
        else files["other"],
        lora=LoRA(r=2, alpha=4) if case.lora else None,
        dtype=case.dtype,
        optimizer=lambda params: torch.optim.SGD(params, lr=LR, momentum=0.9),
        schedule="constant",
        warmup=0,
        gradient_checkpointing=case.checkpointing,
        log_entropy=case.held_out,
    )
    module.watch()
    module.between = case.between
    data = AlignmentData(
        train=Source(files[case.file], limit=case.rows),
        validation=Source(files[case.file], limit=11),  # the slices of 4 are the same on one rank and on two,
        batch_size=case.batch * factor,
        eval_batch_size=2 * factor,
        length_groups=case.length_groups,
        seed=3,
    )
    return module, data


def make_trainer(case: Case, world: int, record: Record, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Under `fsdp` on so many devices; with 0, alone and without a strategy."""
    strategy = FSDP(case.replicas, reduce=case.reduce, process_group_backend="gloo") if world else "auto"
    defaults: dict[str, Any] = {"limit_val_batches": 0, "num_sanity_val_steps": 0, "max_steps": STEPS}
    return L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=world or 1,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
        gradient_clip_algorithm=case.clip_by,
        limit_train_batches=case.limit,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        logger=record,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **defaults | options,
    )


def train(case: Case, files: Files, world: int, alone: bool = False, steps: int = STEPS) -> Results:
    """A short run under `fsdp` on so many ranks; alone, in one process that gets the rows of so many."""
    record = Record()
    module, data = make(case, files, world if alone else 1)
    evaluation = Evaluation(files["thumbs"], text=files["thumbs"], limit=7, max_new_tokens=4, batch_size=3)
    callbacks = [evaluation] if case.held_out else []
    trainer = make_trainer(case, 0 if alone else world, record, *callbacks, max_steps=steps)
    with counted() as counts:
        trainer.fit(module, datamodule=data)
    assert module.policy is not None
    models = {"policy": module.policy, "reference": module.reference}
    found: Results = {
        "rows": record.rows,
        "z0": module.z0,
        "grads": module.grads,  # this rank's rows of them
        "parameters": parameters(module.policy),
        "sharded after each step": module.held,
        "counts": counts,
        "shares": {name: share(model) for name, model in models.items() if isinstance(model, torch.nn.Module)},
        "frozen": not isinstance(module.reference, torch.nn.Module)
        or all(p.grad is None for p in module.reference.parameters()),
    }
    if case.held_out:
        trainer.limit_val_batches = 1.0
        (found["held_out"],) = trainer.validate(module, datamodule=data, verbose=False)
        found["said"] = [(x.prompt, x.completion, x.logratio or 0.0) for x in evaluation.after]
    return found


def parameters(model: Scorer) -> dict[str, Tensor]:
    return {name.removeprefix("lm."): whole(p).detach() for name, p in model.named_parameters()}


def share(model: Scorer) -> tuple[int, int]:
    """Elements that this rank holds, and of the whole model."""
    parameters = [*model.parameters()]
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters), sum(
        p.numel() for p in parameters
    )


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Calls of collectives on the way."""
    counts = {"gathers": 0, "scatters": 0, "sums": 0}

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counter(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return call(*args, **options)

        return counter

    with ExitStack() as stack:
        for owner, key, name in (
            (groups, "foreach_all_gather", "gathers"),
            (groups, "foreach_reduce", "scatters"),
            (dist, "all_reduce", "sums"),
        ):
            stack.enter_context(patch.object(owner, key, counting(name, getattr(owner, key))))
        yield counts


# ---------------------------------------------------------------------------------------------- broken on purpose


def local_sum(values: Tensor, group: Any = None) -> tuple[Tensor, Tensor]:
    values = values.detach().double()
    return values.sum(), values.new_tensor(values.numel())


def kept_whole(module: Any, **options: Any) -> Any:
    return fully_shard(module, **options | {"reshard_after_forward": not isinstance(module, Scorer)})


def all_to_one(module: Any, **options: Any) -> Any:
    """Nothing is sharded, as under Lightning's own default mesh."""
    return module


CONTROLS: dict[str, tuple[str, str, Callable[[], Any]]] = {  # what is wrong then, in which case
    "local z0": ("z0", "kto", lambda: patch("halos_pl.scoring.reference_point._global_sum", local_sum)),
    "local mean": ("grads", "kto", lambda: patch.object(StepMean, "normalize", lambda self, losses: losses.mean())),
    "root kept whole": (
        "loss",
        "kto, a pass before the step",
        lambda: patch.object(sharding, "fully_shard", kept_whole),
    ),
    "nothing sharded": ("grads", "kto", lambda: patch.object(sharding, "fully_shard", all_to_one)),
}


def controls(files: Files, world: int) -> dict[str, Results]:
    found: dict[str, Results] = {}
    for name, (_, case, broken) in CONTROLS.items():
        with broken():
            found[name] = train(CASES[case], files, world, steps=2)
    return found


# ---------------------------------------------------------------------------------------------- other parts


def filled(files: Files, world: int) -> Results:
    """What every rank has of a model that the first one alone has read."""
    plan = sharding.Plan(dist.device_mesh.init_device_mesh("cpu", (world,)), torch.device("cpu"))
    found: Results = {}
    for kind in ("tied", "untied", "llama", "parted"):
        source = ModelSource(files[kind], dtype="float64")
        policy, reference = load_pair(source, source, value_head=True, plan=plan)
        assert reference is not None
        parts = [*policy.named_parameters(), *policy.named_buffers()]
        frozen = [*reference.named_parameters(), *reference.named_buffers()]
        head, embedding = policy.lm.get_output_embeddings().weight, policy.lm.get_input_embeddings().weight
        found[kind] = {
            "policy": {name.removeprefix("lm."): whole(x).detach().clone() for name, x in parts},
            "reference": {name.removeprefix("lm."): whole(x).detach().clone() for name, x in frozen},
            "tied": head is embedding,
            "meta": [name for name, x in (*parts, *frozen) if x.is_meta],
        }
    return found


def told(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # the test says which
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fit(case: Case, files: Files, world: int, **options: Any) -> list[dict[str, float]]:
    record = Record()
    module, data = make(case, files)
    make_trainer(case, world, record, **options).fit(module, datamodule=data)
    return record.rows


def precisions(files: Files, world: int) -> Results:
    """Losses in mixed precision, and what is said of others."""
    half = CASES["kto"]._replace(dtype="float32")

    def refused(precision: str, dtype: str = "float32") -> str:
        return told(lambda: fit(half._replace(dtype=dtype), files, world, precision=precision))

    return {
        "bf16-mixed": fit(half, files, world, precision="bf16-mixed", max_steps=2),
        "refused": {
            "bf16-true": refused("bf16-true"),
            "16-mixed": refused("16-mixed"),
            "64-true": refused("64-true"),
            "bf16-mixed of bfloat16": refused("bf16-mixed", "bfloat16"),
        },
    }


def validated_first(files: Files, world: int) -> Results:
    """`validate` before any training, then training of the same module."""
    record, case = Record(), CASES["kto"]
    module, data = make(case, files)
    trainer = make_trainer(case, world, record, limit_val_batches=1.0)
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.limit_val_batches = 0
    trainer.fit(module, datamodule=data)
    assert module.policy is not None
    return {"before": before, "rows": record.rows, "parameters": parameters(module.policy)}


def errors(files: Files, world: int) -> dict[str, str]:
    """What a rank says when one of them cannot read the model."""
    plan = sharding.Plan(dist.device_mesh.init_device_mesh("cpu", (world,)), torch.device("cpu"))
    found = {}
    for reader, name in (("load_model", "the first"), ("load_skeleton", "another")):
        with patch(f"halos_pl.scoring.pair.{reader}", side_effect=ModelError(f"{name} cannot")):
            found[name] = told(lambda: load_pair(ModelSource(files["tied"]), None, plan=plan))
    return found


def few_rows(files: Files, world: int) -> str:
    return told(lambda: fit(CASES["sft, accumulated"]._replace(rows=1), files, world))


def of_one(files: Files, world: int) -> Results:
    """`fsdp` on one device; with 0, none of it."""
    return {name: train(CASES[name], files, world) for name in ("kto", "sft, accumulated")}


PARTS = {x.__name__: x for x in (controls, filled, errors, precisions, validated_first, few_rows)}


def main(files: str, out: str, *wanted: str) -> None:
    """The cases and parts asked for, to rank0.pt, rank1.pt …"""
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    known, results = json.loads(Path(files).read_text()), {}
    for name in wanted:
        if name in PARTS:
            results[name] = PARTS[name](known, world)
        else:
            results[name] = {case: train(options, known, world) for case, options in MATRICES[name].items()}
    rank = dist.get_rank()
    torch.save(results, Path(out) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
