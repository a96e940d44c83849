"""One training of the comparison with TRL: `python -m benchmarks.peer_run PEER JOB_FILE` prints its report as JSON.

Nothing but the standard library is imported at the top: a peer imports what it needs, and that is its baseline.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

BETA, LEARNING_RATE, CLIP, MAX_LENGTH, LOG_EVERY, SEED = 0.3, 3e-4, 1.0, 256, 10, 0
MIB = 1 << 20


@dataclass(frozen=True)
class Job:
    """What both peers get.

    Args:
        model: folder in Hugging Face format.
        rows: JSONL of prompt, completion, label.
        order: of these rows in the epoch: both peers train on the same batches.
        batch_size: examples of a step; the last batch may be smaller.
        warmup: steps before the clock starts.
        eos_token: ends a completion; None: the tokenizer's.
    """

    model: str
    rows: str
    order: tuple[int, ...]
    batch_size: int
    warmup: int
    eos_token: str | None


class Recorder:
    """Time, losses and memory of one training, filled by a peer's callback at the end of each step."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.baseline, self.started = peak_memory(), time.perf_counter()
        self.ends: list[float] = []
        self.losses: list[Any] = []  # 0-d tensors

    def step(self, loss: Any) -> None:
        self.losses.append(loss.detach())
        self.ends.append(time.perf_counter())

    def result(self, peer: str, tokens: Iterable[tuple[Sequence[int], Sequence[int], bool]]) -> dict[str, Any]:
        """The child's report.

        Args:
            peer: its name.
            tokens: prompt ids, completion ids and label of each row, in the order of training.
        """
        import torch  # loaded by both peers

        fit_seconds, memory = time.perf_counter() - self.started, peak_memory() - self.baseline
        losses = [float(loss) for loss in self.losses]
        timed = len(self.job.order) - self.job.warmup * self.job.batch_size
        digest, prompts, completions = hashlib.sha256(), 0, 0
        for prompt, completion, label in tokens:
            digest.update(json.dumps([prompt, completion, label]).encode())
            prompts, completions = prompts + len(prompt), completions + len(completion)
        tail = losses[-max(1, len(losses) // 4) :]
        return {
            "peer": peer,
            "examples_per_second": timed / (self.ends[-1] - self.ends[self.job.warmup - 1]),
            "fit_seconds": fit_seconds,
            "baseline_mib": self.baseline / MIB,
            "memory_mib": memory / MIB,
            "first_loss": losses[0],
            "last_quarter_loss": statistics.fmean(tail),
            "threads": torch.get_num_threads(),
            "steps": len(losses),
            "rows": len(self.job.order),
            "prompt_tokens": prompts,
            "completion_tokens": completions,
            "data_sha256": digest.hexdigest(),
        }


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes.

    Linux: VmHWM, which begins anew at exec; ru_maxrss would begin at the parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def train_ours(job: Job) -> dict[str, Any]:
    import lightning as L
    import torch

    from halos_pl.data import AlignmentData
    from halos_pl.losses import KTO
    from halos_pl.module import AlignmentModule

    recorder = Recorder(job)

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            recorder.step(outputs["loss"])

    module = AlignmentModule(
        KTO(beta=BETA),
        policy=job.model,
        optimizer=lambda params: torch.optim.AdamW(params, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        schedule="constant",
        warmup=0,
    )
    data = AlignmentData(
        train=job.rows, eos_token=job.eos_token, max_length=MAX_LENGTH, batch_size=job.batch_size, seed=SEED
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=CLIP,
        log_every_n_steps=LOG_EVERY,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Record()],
    )
    trainer.fit(module, datamodule=data)
    examples = [data.datasets["train"].example(i) for i in job.order]
    return recorder.result("ours", ((x.prompt.tolist(), x.completion.tolist(), bool(x.desirable)) for x in examples))


def train_trl(job: Job, *, as_shipped: bool = False) -> dict[str, Any]:
    """TRL with our settings, or with its own defaults of gradient checkpointing (on) and precision (bf16 autocast)."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    trl: Any = importlib.import_module("trl")  # lazy in itself: the next two lines load the trainer
    trainer_class: Any = trl.KTOTrainer
    config_class: Any = trl.KTOConfig
    recorder, peer = Recorder(job), "trl-as-shipped" if as_shipped else "trl"

    class Recorded(trainer_class):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.last_loss = loss.detach()
            return loss

    class Record(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            recorder.step(trainer.last_loss)

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    if job.eos_token is not None:
        tokenizer.eos_token = job.eos_token
    with tempfile.TemporaryDirectory() as folder:
        dataset = load_dataset("json", data_files=job.rows, split="train", cache_dir=folder).select(job.order)
        config = config_class(
            output_dir=folder,
            beta=BETA,
            max_length=MAX_LENGTH,
            per_device_train_batch_size=job.batch_size,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=CLIP,
            **({} if as_shipped else {"gradient_checkpointing": False, "bf16": False}),
            model_init_kwargs={"dtype": torch.float32},
            use_cpu=True,
            dataloader_num_workers=0,
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        )
        trainer = Recorded(
            job.model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[Record()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        rows: Any = trainer.train_dataset
        return recorder.result(peer, ((x["prompt_ids"], x["completion_ids"], x["label"]) for x in rows))


TRAIN: dict[str, Callable[[Job], dict[str, Any]]] = {
    "ours": train_ours,
    "trl": train_trl,
    "trl-as-shipped": partial(train_trl, as_shipped=True),
}


def main(peer: str, job_file: str) -> None:
    values = json.loads(Path(job_file).read_text(encoding="utf-8"))
    with redirect_stdout(sys.stderr):
        result = TRAIN[peer](Job(**values))
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
