"""What tests/test_resume.py runs: trainings, alone in its own process and on every rank of `torch.distributed.run`.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/resume_worker.py MODEL THUMBS OUT
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import Logger
from torch import Tensor

from halos_pl.checkpoints import Checkpoints, FolderIO
from halos_pl.curves import Curves, before
from halos_pl.data import AlignmentData
from halos_pl.fsdp import FSDP
from halos_pl.losses import KTO, Objective
from halos_pl.models import LoRA
from halos_pl.module import AlignmentModule

EPOCHS, LOGGED = 3, 2


class Case(NamedTuple):
    """A run of 3 epochs of 6 micro-batches over all ranks."""

    objective: Objective = KTO(beta=0.5)
    workers: int = 0
    accumulate: int = 1
    max_steps: int = -1
    validate: float | int | None = None
    limit: float = 1.0
    ranks: int = 1
    checkpoints: str = "sharded"
    batch: int = 8
    adapter_dropout: float | None = None
    adam: bool = True  # divides by gradients that may be rounding: not for comparing sums in another order
    data: dict[str, Any] = {}  # noqa: RUF012

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-6 // self.accumulate)


class Rows(L.Callback):
    """Which rows each micro-batch held, by optimizer step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[int]]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        parts = [part for part in (batch.completions, batch.mismatched) if part is not None]
        self.seen.append((trainer.global_step, [x for part in parts for x in part.targets.tolist()]))


def train(case: Case, files: dict[str, str], folder: Path, resume: int | None = None) -> dict[str, Any]:
    """A run with a checkpoint after every step in `folder`, or the rest of that run after one of its steps."""
    torch.manual_seed(len(str(folder)))  # order, y′ and noise must not hang on it
    module = AlignmentModule(
        case.objective,
        policy=files["model"],
        optimizer=lambda params: (
            torch.optim.AdamW(params, lr=0.01) if case.adam else torch.optim.SGD(params, lr=0.05, momentum=0.9)
        ),
        schedule="cosine",
        warmup=2,
        lora=None if case.adapter_dropout is None else LoRA(r=2, dropout=case.adapter_dropout),
    )
    data = AlignmentData(
        train=files["thumbs"],
        validation=None if case.validate is None else files["thumbs"],
        batch_size=case.batch // case.ranks,
        eval_batch_size=64 // case.ranks,
        num_workers=case.workers,
        seed=3,
        **case.data,
    )
    rows = Rows()
    checkpoints = Checkpoints(every_n_steps=1, keep=1000)
    checkpoints.folder = folder / "checkpoints"
    start = None if resume is None else folder / "checkpoints" / f"step={resume}.ckpt"
    curves: Logger = Curves(folder, before(resume or 0, LOGGED))
    trainer = L.Trainer(
        strategy=FSDP(checkpoints=case.checkpoints, process_group_backend="gloo") if case.ranks > 1 else "auto",
        accelerator="cpu",
        devices=case.ranks,
        max_epochs=EPOCHS if case.max_steps < 0 else -1,
        max_steps=case.max_steps,
        limit_train_batches=case.limit,
        accumulate_grad_batches=case.accumulate,
        val_check_interval=case.validate,
        gradient_clip_val=1.0,
        log_every_n_steps=LOGGED,
        num_sanity_val_steps=0,
        callbacks=[rows, checkpoints],
        logger=curves,
        plugins=[FolderIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=None if start is None else str(start))
    assert module.policy is not None
    optimizer = trainer.optimizers[0]
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    logged = curves.rows() if trainer.is_global_zero else []  # type: ignore[attr-defined]
    return {
        "parameters": torch.cat([whole(p).detach().flatten() for p in module.policy.parameters()]),
        "state": [whole(x) for state in states for _, x in sorted(state.items()) if isinstance(x, Tensor)],
        "rows": rows.seen,
        "curves": [{k: v for k, v in row.items() if v and k != "train/tokens_per_second"} for row in logged],
        "steps": trainer.global_step,
    }


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def resumed(case: Case, files: dict[str, str], folder: Path, step: int) -> dict[str, Any]:
    """The rest of a run, in a copy of its folder."""
    copy = folder.with_name(f"{folder.name}-from-{step}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.copytree(folder, copy, symlinks=True)
    if dist.is_initialized():
        dist.barrier()
    return train(case, files, copy, step)


RANKED = {
    "sharded": Case(ranks=2, adam=False),
    "full": Case(ranks=2, checkpoints="full"),
}
RANKED_STEPS = (1, 3, 6, 10)


def main(model: str, thumbs: str, out: str) -> None:
    torch.set_num_threads(1)
    files = {"model": model, "thumbs": thumbs}
    results: dict[str, Any] = {}
    for name, case in RANKED.items():
        results[name] = {"whole": train(case, files, Path(out, name))}
        results[name] |= {step: resumed(case, files, Path(out, name), step) for step in RANKED_STEPS}
    torch.save(results, Path(out, f"rank{dist.get_rank()}.pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
