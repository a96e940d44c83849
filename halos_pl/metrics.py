"""Every logged name, its formula, and how it is averaged over micro-batches and ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from halos_pl.batch import Batch, CompletionLogps, PairedBatch, UnpairedBatch

FORMULAS = {
    "loss": "mean of the objective's losses over examples (over scored tokens for SFT, CSFT and offline PPO)",
    "kl": "z0, the reference point in force: max(0, kl_raw) of each micro-batch (kl_raw itself without a reference); "
    "the running mean of log-ratios for BCO",
    "kl_raw": "mean r(x, y′) over mismatched completions, before the clamp at 0",
    "kl_unclamped": "share of micro-batches whose kl_raw is above 0",
    "rewards/desirable": "mean implied reward (β·r, or the objective's own) over desirable (chosen) completions",
    "rewards/undesirable": "the same over undesirable (rejected) completions",
    "rewards/margin": "rewards/desirable − rewards/undesirable",
    "rewards/accuracy": "pairs: share with reward(chosen) > reward(rejected); else: share with (r > z0) = desirable "
    "(z0 is 0 where the step hands in none)",
    "pair_accuracy": "pairs: share whose chosen completion is the likelier one under the policy (summed logp; the mean "
    "of a token where the objective is length-normalised)",
    "logps/desirable": "mean log-probability of desirable (chosen) completions under the policy, nats a completion",
    "logps/undesirable": "mean log-probability of undesirable (rejected) completions under the policy",
    "logps/all": "mean log-probability of demonstrations under the policy (SFT)",
    "token_nll": "mean −log-probability of a scored token under the policy, nats",
    "humanline/unclamped": "share of tokens whose log-ratio the humanline clamp leaves as it is",
    "ppo/clipped": "share of tokens whose surrogate offline PPO's clip holds constant",
    "ppo/critic_loss": "mean ½(value − return)² of the value head",
    "entropy": "mean entropy of the policy's next-token distribution at scored tokens, nats (log_entropy)",
    "completion_tokens": "mean scored tokens of a completion, EOS included",
    "grad_norm": "mean over the steps since the last log of the Euclidean norm of the whole gradient, before clipping",
    "skipped": "optimizer steps of the run that were left out, their loss or gradient not being finite "
    "(guards.nonfinite skip)",
    "lr": "learning rate of the first parameter group",
    "tokens_per_second": "unpadded tokens of x, y and y′ that were trained on a second, over all ranks",
}
"""Logged under `train/`, `val/` and `test/` (the last four under `train/` only)."""

SAMPLED = {
    "samples/verified": "share of sampled completions that the verifier accepts",
    "samples/verified_low": "lower end of its exact 90 % interval (Clopper and Pearson)",
    "samples/verified_high": "upper end of the same",
    "samples/kl": "mean log-ratio of sampled completions, nats: estimates KL(π‖π_ref) at temperature 1 and top_p 1",
    "samples/kl_token": "the same in nats a token: Σ log-ratios / Σ tokens",
    "samples/distinct": "number of different completions / number of completions",
    "samples/ended": "share of completions that end with EOS within max_new_tokens",
    "samples/tokens": "mean tokens of a completion, EOS included",
    "text/nll": "mean −log-probability of a token of `evaluation.text` under the policy, nats",
}
"""Logged under `val/` by `evaluate.Evaluation`, over completions sampled from the policy."""

Values = Mapping[str, tuple[Tensor, Tensor | None]]
"""name → (values, weights or None): what enters a mean, [any] each. A weight of 0 leaves a value out without a sync."""


class Averages(Metric):
    """Named means, each Σ weight·value / Σ weight over micro-batches and ranks; names without a value are left out."""

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.names = [name for name in FORMULAS if name != "rewards/margin"]
        for state in ("total", "weight"):
            self.add_state(state, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Values) -> None:
        """Add values.

        Raises:
            KeyError: a name without a formula.
        """
        for name, (value, weight) in values.items():
            k = self.names.index(name) if name in self.names else None
            if k is None:
                raise KeyError(f"{name!r} has no formula in metrics.FORMULAS")
            value = value.detach().double()
            if weight is None:
                self.total[k] += value.sum()
                self.weight[k] += value.numel()
            else:
                weight = weight.double()
                self.total[k] += torch.where(weight > 0, value * weight, 0.0).sum()  # inf of weight 0 is not NaN
                self.weight[k] += weight.sum()

    def on_ranks(self) -> list[list[list[float]]]:
        """[ranks, 2, names] sums and weights so far: for a run to go on in the middle of a mean."""
        mine = torch.stack([self.total, self.weight])
        parts = [mine]
        if dist.is_available() and dist.is_initialized():
            parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, mine)
        return [part.tolist() for part in parts]

    def restore(self, parts: list[list[list[float]]]) -> None:
        """What `on_ranks` told: to each its own where there are as many ranks, else all to the first."""
        rank, world = 0, 1
        if dist.is_available() and dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
        if not parts or len(parts[0][0]) != len(self.names):  # written by a release with other names
            return
        states = torch.tensor(parts, dtype=torch.float64)
        if not states[:, 1].any():
            return
        mine = states[rank] if world == len(parts) else states.sum(0) * (rank == 0)
        self.total, self.weight = (x.to(self.total.device) for x in mine)
        self._update_count = 1  # torchmetrics: there is something to compute

    def compute(self) -> dict[str, Tensor]:
        means = self.total / self.weight
        out = {
            name: means[k]
            for k, (name, weight) in enumerate(zip(self.names, self.weight.tolist(), strict=True))
            if weight
        }
        if "rewards/desirable" in out and "rewards/undesirable" in out:
            out["rewards/margin"] = out["rewards/desirable"] - out["rewards/undesirable"]
        return out


def batch_values(
    batch: Batch,
    scores: CompletionLogps,
    losses: Tensor,
    rewards: Tensor | None,
    z0: Tensor | None,
    kl_raw: Tensor | None,
    diagnostics: Mapping[str, Tensor] | None = None,
    *,
    length_normalised: bool = False,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What one micro-batch contributes.

    Args:
        batch: R rows.
        scores: of its completions.
        losses: unreduced, [B] or [N].
        rewards: implied rewards [R], or None where the objective has none.
        z0: reference point in force, 0-d, or None.
        kl_raw: the same before the clamp.
        diagnostics: name → [any] values to average.
        length_normalised: whether pairs are compared by mean log-probability.
    """
    values: dict[str, tuple[Tensor, Tensor | None]] = {
        "loss": (losses, None),
        "token_nll": (-scores.token_logp, None),
        "completion_tokens": (scores.length, None),
    }
    values |= {name: (value, None) for name, value in (diagnostics or {}).items()}
    if z0 is not None:
        rows = None if batch.mismatched is None else torch.full_like(z0, batch.mismatched.num_rows)
        values["kl"] = (z0, rows)
        if kl_raw is not None:
            values |= {"kl_raw": (kl_raw, rows), "kl_unclamped": (kl_raw > 0, None)}
    if scores.entropy is not None:
        values["entropy"] = (scores.entropy, None)
    if not isinstance(batch, (UnpairedBatch, PairedBatch)):
        return values | {"logps/all": (scores.logp, None)}
    desirable = batch.desirable
    sides = {"desirable": desirable, "undesirable": ~desirable}
    values |= {f"logps/{side}": (scores.logp, mask) for side, mask in sides.items()}
    if rewards is not None:
        values |= {f"rewards/{side}": (rewards, mask) for side, mask in sides.items()}
    if isinstance(batch, PairedBatch):
        chosen, rejected = (scores.logp / scores.length if length_normalised else scores.logp).chunk(2)
        values["pair_accuracy"] = (chosen > rejected, None)
        if rewards is not None:
            better, worse = rewards.chunk(2)
            values["rewards/accuracy"] = (better > worse, None)
    elif rewards is not None:
        gain = scores.logratio > (0 if z0 is None else z0)
        values["rewards/accuracy"] = (gain == desirable, None)
    return values


class TokenClock:
    """Tokens a second on this rank since the last restart, in host time."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.tokens, self.since = 0, time.perf_counter()

    def add(self, batch: Batch) -> None:
        self.tokens += batch.completions.num_tokens + (batch.mismatched.num_tokens if batch.mismatched else 0)

    def rate(self) -> float:
        """Tokens a second; begins anew."""
        rate = self.tokens / max(time.perf_counter() - self.since, 1e-9)
        self.restart()
        return rate
