"""What tests/test_two_ranks.py runs: alone in its own process, and on every rank of `torch.distributed.run`.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/two_ranks_worker.py MODEL PAIRS THUMBS OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from halos_pl.accumulation import StepMean
from halos_pl.data import AlignmentData
from halos_pl.evaluate import Evaluation
from halos_pl.losses import BCO, DPO, KTO, SFT, Objective
from halos_pl.metrics import Averages
from halos_pl.module import AlignmentModule
from halos_pl.ranks import agree
from halos_pl.scoring import RunningMean, global_mean, reference_point

STEPS = 8


class Case(NamedTuple):
    objective: Objective
    file: str  # "pairs" or "thumbs"
    batch: int  # of all ranks together
    accumulate: int = 1


CASES = {
    "sft": Case(SFT(), "pairs", 4),
    "sft, accumulated": Case(SFT(), "pairs", 4, accumulate=2),
    "dpo": Case(DPO(beta=0.5), "pairs", 4),
    "kto": Case(KTO(beta=0.5, undesirable_weight=1.5), "pairs", 8),
    "bco": Case(BCO(beta=0.5, undesirable_weight=1.5), "thumbs", 4),
    "kto, one class a rank": Case(KTO(beta=0.5), "thumbs", 2),
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


def train(case: Case, files: dict[str, str], ranks: int) -> dict[str, Any]:
    """Logged rows, held-out metrics and final parameters of a short run in float64."""
    record = Record()
    module = AlignmentModule(
        case.objective,
        policy=files["model"],
        dtype="float64",
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
        schedule="constant",
        warmup=0,
        log_entropy=True,
    )
    data = AlignmentData(
        train=files[case.file],
        validation=files[case.file],
        batch_size=case.batch // ranks,
        eval_batch_size=32 // ranks,
        seed=3,
    )
    evaluation = Evaluation(files["thumbs"], text=files["thumbs"], limit=7, max_new_tokens=6, batch_size=3)
    trainer = L.Trainer(
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        accelerator="cpu",
        devices=ranks,
        max_steps=STEPS,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[evaluation],
        logger=record,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    assert module.policy is not None
    parameters = torch.cat([p.detach().flatten() for p in module.policy.parameters()])
    trainer.limit_val_batches = 1.0
    (held_out,) = trainer.validate(module, datamodule=data, verbose=False)
    said = [(x.prompt, x.completion, x.logratio or 0.0) for x in evaluation.after]
    return {"rows": record.rows, "held_out": held_out, "parameters": parameters, "said": said}


def uneven(rank: int) -> dict[str, float]:
    """Two rows on rank 0 and four on rank 1, or all on one: the wrong means differ from the right one."""

    def mine(*values: list[float]) -> Tensor:
        return torch.tensor(values[rank], dtype=torch.float64)

    averages = Averages()
    averages.update({"loss": (mine([1, 2], [3, 4, 5, 9]), None)})
    if rank == 0:
        averages.update({"rewards/desirable": (torch.tensor([4.0, 7.0]), torch.tensor([True, False]))})
    averages.update({"rewards/undesirable": (mine([1, 2], [3]), mine([1, 1], [0]).bool())})
    found = {f"average {name}": value.item() for name, value in averages.compute().items()}

    linear = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(linear.weight)
    replica, step = DistributedDataParallel(linear), StepMean()
    for micro_batch in (mine([1, 3], [2, 4, 6, 8]), mine([5], [7, 9, 10])):
        (step.normalize(replica(micro_batch[:, None])) / 2).backward()
    step.rescale(linear.parameters(), 2)
    assert linear.weight.grad is not None
    running = RunningMean()
    for k, micro_batch in enumerate((mine([6, 0], [3, 3, -2, 2]), mine([2, 7, 7], []), mine([], []))):
        found[f"running mean after {k + 1}"] = running(micro_batch).item()
    return found | {
        "agreed": agree(rank, -1)[0],
        "step gradient": linear.weight.grad.item(),
        "mean of 2 and 4 rows": global_mean(mine([6, 0], [3, 3, -2, 2])).item(),
        "mean of 2 and 0 rows": global_mean(mine([1, 5], [])).item(),
        "mean of no rows": global_mean(mine([], [])).item(),
        "z0 of a positive mean": reference_point(mine([-4, -4], [5, 5, 5, 5])).item(),
        "z0 of a negative mean": reference_point(mine([-10, -10], [1, 1, 1, 1])).item(),
    }


def main(model: str, pairs: str, thumbs: str, out: str) -> None:
    torch.set_num_threads(1)
    files = {"model": model, "pairs": pairs, "thumbs": thumbs}
    results: dict[str, Any] = {name: train(case, files, ranks=2) for name, case in CASES.items()}
    rank = dist.get_rank()
    results["uneven"] = uneven(rank)
    torch.save(results, Path(out) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
