"""The LightningModule: policy and reference under one objective. One training step serves every loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from halos_kernels import seq_logratio
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from halos_pl import resume
from halos_pl.batch import Batch, CompletionLogps, PairedBatch, Sequences, UnpairedBatch
from halos_pl.fsdp import refuse_others
from halos_pl.losses import KTO, NaNError, Objective, nan_passes
from halos_pl.metrics import Averages, TokenClock, Values, batch_values
from halos_pl.models import LoRA, ModelError, ModelSource, check_precision
from halos_pl.needs import data_needs, reference_source
from halos_pl.ranks import several_ranks
from halos_pl.schedule import Schedule
from halos_pl.scoring import (
    Reference,
    RunningMean,
    Scorer,
    compare,
    global_mean,
    load_pair,
    per_token,
    reference_point,
    score_both,
)
from halos_pl.stepping import SteppedModule

Dtype = Literal["float32", "bfloat16", "float64"]


class Evaluation(NamedTuple):
    """An objective evaluated on one micro-batch."""

    losses: Tensor  # [B], or [N] where the objective's unit is the token
    scores: CompletionLogps  # R rows
    rewards: Tensor | None  # [R]
    z0: Tensor | None  # 0-d
    kl_raw: Tensor | None  # 0-d
    diagnostics: Mapping[str, Tensor]  # what else the objective has to say, [any] each


class AlignmentModule(SteppedModule):
    """A policy that an objective aligns against a frozen reference.

    Args:
        objective: The loss: KTO, DPO or any other that `python -m halos_pl objectives` lists, or a class of your own.
        policy: Folder in Hugging Face format, or hub name.
        reference: `copy` (the policy as it was at the start, frozen), `none`, or a folder or hub name. Objectives that
            compare with nothing (SFT, SimPO …) load none. KTO without a reference uses mean token log-probabilities and
            a z0 that is not clamped (KTO paper, reference-free variant); other objectives refuse.
        config: Random weights instead of `policy`: a config.json, its folder, or its content.
        tokenizer: Folder or hub name. Default: the policy's.
        dtype: Of the weights: float32, bfloat16 or float64. For mixed precision keep float32 here and set
            `--trainer.precision bf16-mixed`.
        dropout: Keep the dropout of the model's configuration. Off: log-ratios of one model with itself are exactly 0.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        compile: Run every layer through torch.compile, by itself.
        attn_implementation: As in transformers: sdpa, eager, flash_attention_2 …
        trust_remote_code: Run model code that the folder or hub brings.
        init_seed: Of the random weights that `config` asks for.
        lora: Train adapters beside frozen weights; `copy` is then the policy with its adapters off, no second model.
        optimizer: Any torch optimizer.
        schedule: Of the learning rate after the warm-up: constant, linear or cosine decay to 0 at the last step.
        warmup: Optimizer steps (an integer from 1 on), or a share of all steps (below 1).
        log_entropy: Also compute and log the entropy of the policy at scored tokens.
    """

    def __init__(
        self,
        objective: Objective = KTO(),  # noqa: B008  frozen
        policy: str | None = None,
        reference: str = "copy",
        config: str | dict[str, Any] | None = None,
        tokenizer: str | None = None,
        dtype: Dtype = "float32",
        dropout: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        init_seed: int = 0,
        lora: LoRA | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-6, weight_decay=0.0),
        schedule: Schedule = "cosine",
        warmup: int | float = 0.1,
        log_entropy: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, warmup)
        self.strict_loading = False  # a checkpoint has what is trained; `resume.fitting` sees that it has all of that
        if not isinstance(objective, Objective):
            raise TypeError(f"objective must be an instance such as KTO(beta=0.1), got {objective!r}")
        self.source = ModelSource(policy, config, dtype, dropout, attn_implementation, trust_remote_code, init_seed)
        if lora is not None:
            lora.check(self.source)
        self.reference_source = reference_source(objective, self.source, reference)
        tokenizer = tokenizer or policy
        if tokenizer is None:
            raise ValueError("--model.config brings no tokenizer: name one with --model.tokenizer FOLDER_OR_HUB_NAME")
        self.objective, self.log_entropy, self.lora = objective, log_entropy, lora
        self.gradient_checkpointing, self.compile_layers = gradient_checkpointing, compile
        self._settings = resume.settings(objective, optimizer) | {"lora": str(lora)}
        models = [self.source, *([self.reference_source] if self.reference_source else [])]
        self.data_needs = data_needs(objective, models, tokenizer, trust_remote_code=trust_remote_code)
        self.policy: Scorer | None = None
        self.reference: Reference | None = None
        self.running_mean = RunningMean() if objective.reference_point_from == "running_mean" else None
        self.val_averages, self._clock = Averages(), TokenClock()
        self._row: dict[str, Tensor | float] = {}  # the latest of training
        self.nan_passes = False  # in training NaN is left to whoever is asked; with several ranks none may stop alone

    # ------------------------------------------------------------------------------------------ models

    def setup(self, stage: str) -> None:
        refuse_others(self.trainer.strategy)
        check_precision(str(self.trainer.precision), self.source.dtype, training=stage == "fit" and self.lora is None)

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        strategy = None if self._trainer is None else self.trainer.strategy
        self.policy, self.reference = load_pair(
            self.source,
            self.reference_source,
            self.lora,
            value_head=self.objective.needs_value_head,
            checkpointing=self.gradient_checkpointing,
            compile_layers=self.compile_layers,
            plan=getattr(strategy, "plan", None),  # of the strategy fsdp
            offload_reference=getattr(strategy, "offload_reference", False),
        )

    def train(self, mode: bool = True) -> AlignmentModule:
        super().train(mode)
        if isinstance(self.reference, Scorer):
            self.reference.eval()
        return self

    # ------------------------------------------------------------------------------------------ one batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        result = self.evaluate(batch)
        self.train_averages.update(self._values(batch, result))
        self._clock.add(batch)
        return self._step_mean.normalize(result.losses)

    def evaluate(self, batch: Batch) -> Evaluation:
        """The objective on one micro-batch: the one path that training and validation of every loss take."""
        z0, kl_raw = self.estimate_z0(batch.mismatched)
        scores = self.score(batch.completions, entropy=self.log_entropy)
        if self.running_mean is not None:
            z0 = self.running_mean(scores.logratio)
        desirable = batch.desirable if isinstance(batch, (UnpairedBatch, PairedBatch)) else None
        if isinstance(batch, UnpairedBatch):
            scores = replace(scores, score=batch.score)
        with nan_passes(several_ranks() or (self.nan_passes and self.training)):
            try:
                losses = self.objective.losses(scores, desirable, z0)
            except NaNError as error:
                raise self.diverged(str(error)) from error
            diagnostics = self.objective.diagnostics(scores, desirable)
            return Evaluation(losses, scores, self.objective.rewards(scores), z0, kl_raw, diagnostics)

    def score(self, rows: Sequences, *, entropy: bool = False) -> CompletionLogps:
        """Policy against reference on token rows; only the policy's part carries a gradient."""
        if self.policy is None:
            raise RuntimeError("no model yet: call configure_model() first (a Trainer does)")
        if self.reference is None:
            scores = compare(self.policy(rows, entropy=entropy), None, rows)
        else:
            both = score_both(self.policy, self.reference, rows, entropy=entropy)
            scores = compare(*both, rows, clamp=self.objective.token_clamp)
        return per_token(scores) if self.is_reference_free else scores

    @torch.no_grad()
    def estimate_z0(self, mismatched: Sequences | None) -> tuple[Tensor | None, Tensor | None]:
        """z0 and its value before the clamp. Runs before the policy's own pass, while no activations are held."""
        if mismatched is None:
            return None, None
        logratio = self.score(mismatched).logratio
        kl_raw = global_mean(logratio)
        return (kl_raw if self.is_reference_free else reference_point(logratio)), kl_raw

    @property
    def is_reference_free(self) -> bool:
        return self.objective.needs_reference and self.reference is None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_averages.update(self._values(batch, self.evaluate(batch)))

    def _values(self, batch: Batch, result: Evaluation) -> Values:
        return batch_values(batch, **result._asdict(), length_normalised=self.objective.length_normalised)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Scores of each row: logp, length; ref_logp, logratio, reward and mean entropy of a token where they exist."""
        scores = self.score(batch.completions, entropy=self.log_entropy)
        found = {"logp": scores.logp, "ref_logp": scores.ref_logp, "length": scores.length}
        if scores.entropy is not None:
            found["entropy"] = seq_logratio(scores.entropy, None, batch.completions.cu_seqlens).logp / scores.length
        if scores.ref_logp is not None:
            found["logratio"] = scores.logratio
        if not self.is_reference_free:
            found["reward"] = self.objective.rewards(scores)
        return {name: value for name, value in found.items() if value is not None}

    # ------------------------------------------------------------------------------------------ logging

    def on_train_start(self) -> None:
        super().on_train_start()
        self._clock.restart()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.source.dropout or (
            self.lora is not None and self.lora.dropout
        ):  # the same noise, however often the run is resumed
            torch.manual_seed(resume.noise_seed(self.source.seed, self.trainer))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if row := self._write_row():
            self.log_dict(row, logger=False)  # for progress bars and callbacks

    def _write_row(self) -> dict[str, Tensor | float]:
        """The row of this step, if one is due: once, and before a checkpoint of the step, which goes on after it."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the trainer's connectors
        if self._stepped and every and not self.global_step % every:
            self._row = {f"train/{name}": value for name, value in self._training_values().items()}
            self._log_row(self._row)
        self._stepped = False
        return self._row

    def _log_row(self, row: Mapping[str, Tensor | float]) -> None:
        values = {name: float(value) for name, value in row.items()} | {"epoch": self.current_epoch}
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.global_step - 1)

    def on_train_end(self) -> None:
        """The steps after the last logged one; Lightning's `log` is over."""
        if self.train_averages.update_count:
            self._log_row({f"train/{name}": value for name, value in self._training_values().items()})

    def _training_values(self) -> dict[str, Tensor | float]:
        values: dict[str, Tensor | float] = dict(self.train_averages.compute())
        if not math.isfinite(values.get("loss", 0.0)):
            raise self.diverged("the loss is not finite any more")
        self.train_averages.reset()
        values |= self.told
        values["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        values["tokens_per_second"] = self._clock.rate() * self.trainer.world_size
        return values

    def diverged(self, what: str, step: int | None = None) -> ModelError:
        remedy = "lower --model.optimizer.lr, or raise --model.warmup; nothing is exported"
        return ModelError(f"{what} at step {self.global_step if step is None else step}: {remedy}")

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        values = self.val_averages.compute()
        self.val_averages.reset()
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()})
        self._clock.restart()

    # ------------------------------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is trained, and nothing that is loaded anew: neither reference nor frozen weights."""
        self._write_row()
        state = checkpoint["state_dict"]
        trained = [name for name, p in self.named_parameters() if p.requires_grad]
        counted = [name for name in state if name.startswith("running_mean.")]
        checkpoint["state_dict"] = {name: state[name] for name in (*trained, *counted)}
        checkpoint[resume.KEY] = {**self._settings, "averages": self.train_averages.on_ranks()}
        checkpoint["trained"] = trained

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn == "fit":
            resume.check(checkpoint, self._settings)
            self.train_averages.restore(checkpoint[resume.KEY].get("averages", []))
        checkpoint["state_dict"] = resume.fitting(checkpoint["state_dict"], self)
