"""How a model is trained: ranks, micro-batch, precision, what is kept of the reference."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Strategy = Literal["single", "ddp", "fsdp"]
Compute = Literal["float32", "bfloat16", "autocast"]
Reference = Literal["none", "resident", "offloaded", "adapter", "cached"]

REFERENCES = {
    "none": "no reference model: the objective needs none, or runs without",
    "resident": "a frozen copy beside the policy, sharded alike",
    "offloaded": "the copy in host memory, sent to the device shard by shard in every pass",
    "adapter": "the policy with its LoRA adapters switched off: passes, but no weights",
    "cached": "log-probabilities computed before the training: neither weights nor passes",
}


class PlanError(ValueError):
    """A plan that cannot be; the message names the option."""


@dataclass(frozen=True)
class Lora:
    """Adapters of one rank in every decoder layer."""

    r: int = 16
    targets: tuple[str, ...] | None = None  # names of linear layers; None: all of them


@dataclass(frozen=True)
class Plan:
    """One optimizer step.

    `float32` and `bfloat16` compute say what the weights are cast to where they are used (by FSDP2, or because they are
    stored so); `autocast` is PyTorch's, with its own copies.
    """

    rows: int  # token rows of a micro-batch, on each GPU: the batch size, or twice that for pairs
    length: int  # tokens of a row, padding included
    gpus: int = 1
    shard: int = 1  # GPUs that share one copy of the weights; gpus / shard replicas
    strategy: Strategy = "single"
    scored: float = 0.5  # share of the tokens that belong to completions
    accumulate: int = 1  # micro-batches of an optimizer step
    compute: Compute = "bfloat16"
    weight_bytes: int = 4
    reference: Reference = "resident"
    reference_bytes: int = 4  # of a stored number of the reference
    mismatched: bool = True  # passes on y′
    checkpointing: bool = False
    lora: Lora | None = None
    optimizer_states: int = 2  # float32 numbers that the optimizer keeps of each parameter

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and field.name != "optimizer_states" and value < 1:
                raise PlanError(f"{field.name} must be at least 1, got {value}")
        if not 0 < self.scored <= 1:
            raise PlanError(f"scored must be in (0, 1], got {self.scored}")
        if self.gpus % self.shard:
            raise PlanError(f"--shard {self.shard} does not divide the {self.gpus} GPUs into equal groups")
        if self.strategy != "fsdp" and self.shard > 1:
            raise PlanError(f"--shard {self.shard} needs --trainer.strategy fsdp, not {self.strategy}")
        if self.strategy == "single" and self.gpus > 1:
            raise PlanError(f"{self.gpus} GPUs need --trainer.strategy fsdp or ddp")
        if self.strategy == "fsdp" and self.compute == "autocast":
            raise PlanError("FSDP2 casts the weights itself: compute is bfloat16 or float32")
        if self.reference == "adapter" and self.lora is None:
            raise PlanError("--reference adapter switches adapters off: it needs --model.lora.r")

    @property
    def replicas(self) -> int:
        return self.gpus // self.shard

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on each GPU, n."""
        return self.rows * self.length

    @property
    def targets(self) -> int:
        """Scored tokens of a micro-batch, N."""
        return max(1, round(self.tokens * self.scored))

    @property
    def bytes(self) -> int:
        """Of a number in the products."""
        return 4 if self.compute == "float32" else 2

    @property
    def has_copy(self) -> bool:
        """Whether the reference has weights of its own."""
        return self.reference in ("resident", "offloaded")

    @property
    def compares(self) -> bool:
        """Whether the reference is run in the step."""
        return self.has_copy or self.reference == "adapter"

    @property
    def passes(self) -> dict[str, int]:
        """How often each model runs in a micro-batch, by kind of pass."""
        mismatched = int(self.mismatched)
        return {
            "policy y′ forward": mismatched,
            "policy y forward": 1,
            "policy y backward": 1,
            "reference y′ forward": mismatched * self.compares,
            "reference y forward": int(self.compares),
        }
