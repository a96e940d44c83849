"""What tests/test_guards_ranks.py runs on every rank of `torch.distributed.run`.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/guards_worker.py MODEL THUMBS OUT HANG
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from halos_pl.data import AlignmentData
from halos_pl.guards import Guards
from halos_pl.losses import KTO
from halos_pl.models import ModelError
from halos_pl.module import AlignmentModule
from halos_pl.ranks import agree


class Harm(L.Callback):
    """Does something to rank 1 in step 3."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.after: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        harmed = trainer.global_rank == 1 and trainer.global_step == 2
        if harmed and self.what == "sleep":
            time.sleep(600)
        if harmed and self.what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        score = AlignmentModule.score.__get__(pl_module)

        def poisoned(*args: Any, **kwargs: Any) -> Any:
            scores = score(*args, **kwargs)
            return replace(scores, logratio=scores.logratio * math.nan)

        pl_module.score = poisoned if harmed and self.what == "nan" else score

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.after.append(torch.cat([p.detach().flatten().clone() for p in pl_module.policy.parameters()]))


def train(model: str, file: str, guards: Guards, what: str) -> dict[str, Any]:
    harm, told = Harm(what), ""
    module = AlignmentModule(
        KTO(),
        policy=model,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        schedule="constant",
        warmup=0,
    )
    trainer = L.Trainer(
        strategy=DDPStrategy(process_group_backend="gloo"),
        accelerator="cpu",
        devices=2,
        max_steps=5,
        log_every_n_steps=5,
        gradient_clip_val=1.0,
        callbacks=[harm, guards],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, datamodule=AlignmentData(train=file, batch_size=4))
    except ModelError as error:
        told = str(error)
    return {"after": harm.after, "told": told, "skipped": guards.skipped}


def main(model: str, thumbs: str, out: str, hang: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "skip": train(model, thumbs, Guards("skip"), "nan"),
        "stop": train(model, thumbs, Guards("stop"), "nan"),
        "limit": train(model, thumbs, Guards("skip", max_skipped=0), "nan"),
    }
    rank = dist.get_rank()
    found["agree"] = agree(rank, -rank, math.nan if rank > 5 else 0.25)
    torch.save(found, Path(out) / f"rank{rank}.pt")
    train(model, thumbs, Guards(timeout=4 / 60), hang)


if __name__ == "__main__":
    main(*sys.argv[1:])
