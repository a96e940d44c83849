"""What a run must compute, in one process of plain transformers and torch: whole logits, whole models, the papers'
formulas. Nothing of halos_pl's module, scorer, kernels, losses, collation or accumulation is used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

PEFT = "base_model.model."
Row = tuple[Any, Any]  # token ids of a prompt and of its completion


class Micro(NamedTuple):
    """A micro-batch of all ranks together; of pairs, the chosen rows stand first."""

    rows: list[Row]
    mismatched: list[Row]
    desirable: list[bool]
    of_rank: list[int]  # whose each row is


def micro_batch(items_of_ranks: Sequence[Sequence[Any]]) -> Micro:
    """From the items of the data set that each rank gets."""
    rows: list[list[tuple[Row, Row | None, bool, int]]] = [[], []]
    for rank, items in enumerate(items_of_ranks):
        for item in items:
            for k, example in enumerate(item.examples):
                partner = None if item.mismatched is None else (example.prompt, item.mismatched[k])
                rows[k].append(((example.prompt, example.completion), partner, bool(example.desirable), rank))
    found = [row for side in rows for row in side]
    return Micro(
        [row for row, *_ in found],
        [partner for _, partner, *_ in found if partner is not None],
        [label for *_, label, _ in found],
        [rank for *_, rank in found],
    )


def token_logps(lm: PreTrainedModel, rows: Sequence[Row]) -> list[Tensor]:
    """Of each row, log π of its completion's tokens, from logits of all tokens."""
    texts = [torch.from_numpy(np.concatenate([x, y]).astype(np.int64)) for x, y in rows]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    logps = lm(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    chosen = logps.gather(2, ids[:, 1:, None]).squeeze(2)
    return [chosen[i, len(x) - 1 : len(x) + len(y) - 1] for i, (x, y) in enumerate(rows)]


def sums(lm: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
    return torch.stack([row.sum() for row in token_logps(lm, rows)])


class Losses:
    """The losses of a micro-batch, with z0 over all of its rows on all ranks (KTO), or over all rows so far (BCO)."""

    def __init__(self, case: Any, policy: PreTrainedModel, reference: PreTrainedModel) -> None:
        self.kind, self.objective = type(case.objective).__name__, case.objective
        self.policy, self.reference, self.seen = policy, reference, []
        self.size = 0.0  # Σ|log π| of the largest micro-batch

    def __call__(self, micro: Micro) -> tuple[Tensor, float | None]:
        if self.kind == "SFT":  # the mean over tokens
            tokens = torch.cat(token_logps(self.policy, micro.rows))
            self.size = max(self.size, float(tokens.detach().abs().sum()))
            return -tokens, None
        logp = sums(self.policy, micro.rows)
        with torch.no_grad():
            ratio = logp - sums(self.reference, micro.rows)
        ratio = logp - (logp - ratio).detach()
        self.size = max(self.size, float(logp.detach().abs().sum()))
        beta = self.objective.beta
        if self.kind == "DPO":
            better, worse = ratio.chunk(2)
            return -torch.log(torch.sigmoid(beta * (better - worse))), None
        z0 = self._reference_point(micro, ratio.detach())
        good = torch.tensor(micro.desirable)
        weight = torch.where(good, self.objective.desirable_weight, self.objective.undesirable_weight)
        value = torch.sigmoid(beta * torch.where(good, ratio - z0, z0 - ratio))
        return weight * (-torch.log(value) if self.kind == "BCO" else 1 - value), z0

    def _reference_point(self, micro: Micro, ratio: Tensor) -> float:
        if self.kind == "BCO":
            self.seen += ratio.tolist()
            return sum(self.seen) / len(self.seen)
        with torch.no_grad():
            apart = sums(self.policy, micro.mismatched) - sums(self.reference, micro.mismatched)
        return max(0.0, float(apart.mean()))


class Off:
    """A model with its adapters off."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm

    def __call__(self, **batch: Tensor) -> Any:
        with self.lm.disable_adapter():
            return self.lm(**batch)


def adapted(lm: PreTrainedModel) -> tuple[Any, Any]:
    """peft's model with adapters of all linear layers of a GPT-2 but its head, and the same without them."""
    import peft

    targets = ["c_attn", "c_fc", "c_proj"]
    torch.manual_seed(0)  # the module's default
    model = peft.get_peft_model(lm, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, fan_in_fan_out=True))
    return model, Off(model)


def train(case: Any, policy: str, reference: str, steps: Sequence[Sequence[Micro]], lr: float) -> dict[str, Any]:
    """Of each optimizer step: loss, norm of the whole gradient, the gradient that the optimizer gets; of each
    micro-batch z0; the parameters afterwards.

    Args:
        case: objective, dtype, clip and clip_by.
        policy: folder.
        reference: folder.
        steps: the micro-batches of each.
        lr: of SGD with momentum 0.9.
    """
    lm, frozen = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, case.dtype)).eval()
        for folder in (policy, reference)
    )
    if case.lora:
        lm, frozen = adapted(lm)
    optimizer = torch.optim.SGD(lm.parameters(), lr=lr, momentum=0.9)
    losses = Losses(case, lm, frozen)
    out: dict[str, Any] = {"loss": [], "norm": [], "z0": [], "grads": []}
    for micros in steps:
        optimizer.zero_grad()
        unit = [len(micro.rows) for micro in micros]
        if losses.kind == "SFT":
            unit = [sum(len(y) for _, y in micro.rows) for micro in micros]
        elif losses.kind == "DPO":
            unit = [n // 2 for n in unit]
        total = 0.0
        for micro in micros:
            each, z0 = losses(micro)
            (each.sum() / sum(unit)).backward()
            total += float(each.detach().sum())
            out["z0"].append(z0)
        out["loss"].append(total / sum(unit))
        grads = [p.grad for p in lm.parameters() if p.grad is not None]
        out["norm"].append(float(torch.cat([g.flatten() for g in grads]).norm()))
        if case.clip is not None and case.clip_by == "norm":
            torch.nn.utils.clip_grad_norm_(lm.parameters(), case.clip)
        elif case.clip is not None:
            torch.nn.utils.clip_grad_value_(lm.parameters(), case.clip)
        named = ((name.removeprefix(PEFT), p.grad) for name, p in lm.named_parameters())
        out["grads"].append({name: grad.clone() for name, grad in named if grad is not None})
        optimizer.step()
    out["parameters"] = {name.removeprefix(PEFT): p.detach().clone() for name, p in lm.named_parameters()}
    out["size"] = losses.size
    return out
