"""Every objective in the training step: against a naive loop over whole logits, its passes, and what must matter.

The file is long because the naive formulas of all objectives and the runs of all cases serve every test here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import halos_pl.scoring.pair
from halos_pl.batch import Batch, PairedBatch
from halos_pl.data import AlignmentData
from halos_pl.losses import (
    BCO,
    CDPO,
    CSFT,
    DPO,
    IPO,
    KTO,
    OBJECTIVES,
    ORPO,
    SFT,
    APOZero,
    KTOv1,
    Objective,
    PPOOffline,
    SimPO,
    SLiC,
)
from halos_pl.module import AlignmentModule
from halos_pl.objectives import cells
from halos_pl.scoring import Scorer

STEPS, LR = 6, 0.01
NARROW = (-0.05, 0.05)
KT = "kahneman_tversky"
CASES: dict[str, Objective] = {
    "kto": KTO(beta=0.5, undesirable_weight=1.5),
    "kto without z0": KTO(beta=0.5, desirable_weight=1.25, reference_point=False),
    "kto reference-free": KTO(beta=2.0, undesirable_weight=1.5),
    "kto log_logistic": KTO(beta=0.5, value="log_logistic", undesirable_weight=1.5),
    "kto identity": KTO(beta=0.1, value="identity", desirable_weight=0.75),
    "kto kahneman_tversky": KTO(beta=0.5, value=KT, alpha=0.7, loss_aversion=1.75),
    "kto humanline": KTO(beta=0.5, undesirable_weight=1.5, humanline=NARROW),
    "dpo": DPO(beta=0.5),
    "dpo humanline": DPO(beta=0.5, humanline=NARROW),
    "sft": SFT(),
    "cdpo": CDPO(beta=0.5, epsilon=0.2),
    "ipo": IPO(tau=0.5),
    "ipo humanline": IPO(tau=0.5, humanline=(-0.02, 0.03)),
    "simpo": SimPO(beta=2.5, gamma=0.5),
    "slic": SLiC(beta=2.0, lambda_coef=0.2),
    "orpo": ORPO(lambda_coef=0.5),
    "ppo": PPOOffline(clip_low=0.9, clip_high=1.1),
    "ppo score": PPOOffline(reward="score", clip_low=0.9, clip_high=1.1),
    "ppo critic": PPOOffline(clip_low=0.9, clip_high=1.1, critic=True, critic_coef=0.5, gamma=0.9, gae_lambda=0.8),
    "ppo critic, score": PPOOffline(critic=True, reward="score", critic_coef=0.5, gamma=0.97),
    "ppo kl": PPOOffline(clip_low=0.9, clip_high=1.1, kl_coef=2.0),
    "ppo humanline": PPOOffline(humanline=NARROW, kl_coef=0.5),
    "csft": CSFT(),
    "kto v1": KTOv1(beta=0.5),
    "apo-zero": APOZero(beta=0.5, undesirable_weight=1.5),
    "bco": BCO(beta=0.5, undesirable_weight=1.5),
    "bco humanline": BCO(beta=0.5, humanline=NARROW),
}
SLOWER = {"slic": 0.1, "kto identity": 0.5}
"""Shares of LR, where sums of log-probabilities without a bound would diverge."""
OF_THE_BATCH = ("kto v1", "bco", "bco humanline", "ppo critic", "ppo critic, score")
"""Objectives with a statistic of the micro-batch; KTO with z0 is one too."""


def has_z0(objective: Objective) -> bool:
    return objective.reference_point_from == "mismatched"


def test_every_objective_has_a_case() -> None:
    assert {type(x) for x in CASES.values()} == {*OBJECTIVES}


class Losses(Logger):
    """Keeps train/loss of every optimizer step."""

    name, version = "losses", 0

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "train/loss" in metrics:
            self.values.append(metrics["train/loss"])

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


@dataclass
class Bench:
    """The folder of a model, files of feedback, and how they become runs."""

    model: Path
    thumbs: Path  # 20 rows with label and score
    pairs: Path  # 10
    runs: dict[tuple[str, int], list[float]]

    def file(self, objective: Objective) -> Path:
        return self.thumbs if objective.view == "unpaired" else self.pairs

    def module(self, case: str, objective: Objective | None = None, **options: Any) -> AlignmentModule:
        def optimizer(params: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(params, lr=LR * SLOWER.get(case, 1.0), momentum=0.9)

        reference = {"reference": "none"} if case == "kto reference-free" else {}
        options = (
            {"dtype": "float64", "optimizer": optimizer, "schedule": "constant", "warmup": 0} | reference | options
        )
        return AlignmentModule(objective or CASES[case], policy=str(self.model), **options)

    def data(self, module: AlignmentModule, accumulate: int = 1, **options: Any) -> AlignmentData:
        objective = module.objective
        size = (8 if objective.view == "unpaired" else 4) // accumulate
        sampler = "stratified" if objective.equal_halves else "shuffle"
        file = str(self.file(objective))
        options = {"batch_size": size, "eval_batch_size": size, "seed": 3, "sampler": sampler} | options
        data = AlignmentData(train=file, **options)
        data.needs = module.data_needs
        return data

    def batch(self, module: AlignmentModule, **options: Any) -> Batch:
        data = self.data(module, **options)
        data.setup("fit")
        return next(iter(data.train_dataloader()))

    def losses(self, case: str, accumulate: int = 1) -> list[float]:
        """train/loss of each step, trained once a case."""
        if (case, accumulate) not in self.runs:
            losses, module = Losses(), self.module(case)
            L.Trainer(
                max_steps=STEPS,
                accelerator="cpu",
                accumulate_grad_batches=accumulate,
                log_every_n_steps=1,
                logger=losses,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(module, datamodule=self.data(module, accumulate))
            self.runs[case, accumulate] = losses.values
        return self.runs[case, accumulate]


@pytest.fixture(scope="module")
def bench(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("steps")
    words = "cat dogs sees a bird there hears small red old".split()  # noqa: SIM905

    def words_of(i: int, n: int) -> str:
        return " ".join(words[(i * 7 + 3 * k + i * k) % len(words)] for k in range(n))

    thumbs = [
        {
            "prompt": words_of(i, 1 + i % 3) + f" {i}:",
            "completion": " " + words_of(3 * i + 1, 1 + i % 4),
            "label": bool(i % 5 % 2) or i % 4 == 0,
            "score": ((i * 5) % 11 - 4) / 4,  # a float32 holds it
        }
        for i in range(20)
    ]
    pairs = [
        {
            "prompt": words_of(i, 1 + i % 3) + f" {i}:",
            "chosen": " " + words_of(3 * i + 1, 1 + i % 4),
            "rejected": " " + words_of(5 * i + 2, 1 + (i + 1) % 3),
        }
        for i in range(10)
    ]
    for name, rows in (("thumbs", thumbs), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Bench(tiny_model, folder / "thumbs.jsonl", folder / "pairs.jsonl", {})


# -------------------------------------------------------------------------------------------------- the truth


@dataclass
class Row:
    """One completion."""

    logp: Tensor  # [n] policy
    ref: Tensor | None  # [n]
    value: Tensor | None  # [n]
    desirable: bool = True
    score: float = 0.0
    bounds: tuple[float, float] | None = None

    @property
    def token_ratios(self) -> Tensor:
        assert self.ref is not None
        ratios = self.logp - self.ref
        return ratios if self.bounds is None else ratios.clamp(*self.bounds)

    @property
    def ratio(self) -> Tensor:
        """Without a reference: the mean log-probability."""
        return self.logp.mean() if self.ref is None else self.token_ratios.sum()


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def of_pair(o: Any, w: Row, l: Row) -> Tensor:  # noqa: E741  winner and loser
    if isinstance(o, CDPO):
        gain = o.beta * (w.ratio - l.ratio)
        return -(1 - o.epsilon) * log_sigmoid(gain) - o.epsilon * log_sigmoid(-gain)
    if isinstance(o, DPO):
        return -log_sigmoid(o.beta * (w.ratio - l.ratio))
    if isinstance(o, IPO):
        return (w.token_ratios.mean() - l.token_ratios.mean() - 0.5 / o.tau) ** 2
    if isinstance(o, SimPO):
        return -log_sigmoid(o.beta * w.logp.mean() - o.beta * l.logp.mean() - o.gamma)
    if isinstance(o, SLiC):
        hinge = o.beta - w.logp.sum() + l.logp.sum()
        return (hinge if hinge > 0 else 0 * hinge) - o.lambda_coef * w.logp.sum()
    assert isinstance(o, ORPO)
    p, q = w.logp.mean().exp(), l.logp.mean().exp()
    return -p.log() - o.lambda_coef * log_sigmoid((p / (1 - p) / (q / (1 - q))).log())


def of_thumb(o: Any, row: Row, z0: Tensor | float) -> Tensor:
    weight = o.desirable_weight if row.desirable else o.undesirable_weight
    gain = o.beta * (row.ratio - z0) * (1 if row.desirable else -1)
    value = "log_logistic" if isinstance(o, BCO) else o.value
    if value == "logistic":
        return weight * (1 - 1 / (1 + torch.exp(-gain)))
    if value == "log_logistic":
        return -weight * log_sigmoid(gain)
    if value == "identity":
        return -weight * gain
    if gain.abs() < 1e-3:  # the true slope at 0 is infinite
        worth = gain * 1e-3 ** (o.alpha - 1)
    else:
        worth = gain**o.alpha if gain > 0 else -((-gain) ** o.alpha)
    return -weight * (worth if gain >= 0 else o.loss_aversion * worth)


def of_halves(o: KTOv1, rows: Sequence[Row]) -> Tensor:
    z = {}
    for side in (True, False):
        ratios = [row.ratio for row in rows if row.desirable is side]
        z[side] = (sum(ratios) / len(ratios)).clamp_min(0)  # type: ignore[union-attr]
    gains = [row.ratio - z[False] if row.desirable else z[True] - row.ratio for row in rows]
    return torch.stack([1 - torch.sigmoid(o.beta * gain) for gain in gains]).mean()


def of_tokens(o: PPOOffline, rows: Sequence[Row], bites: set[str]) -> Tensor:
    """Offline PPO, with the sums of generalized advantages as they are defined."""
    advantages, critic = [], []
    for row in rows:
        n, reward = len(row.logp), row.score if o.reward == "score" else 1.0 if row.desirable else -1.0
        if row.value is None:
            advantages += [reward] * n
            continue
        values = [*row.value.tolist(), 0.0]
        deltas = [(reward if t == n - 1 else 0.0) + o.gamma * values[t + 1] - values[t] for t in range(n)]
        advantages += [sum((o.gamma * o.gae_lambda) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        critic += [(row.value[t] - o.gamma ** (n - 1 - t) * reward) ** 2 / 2 for t in range(n)]
    if critic:
        mean = sum(advantages) / len(advantages)
        variance = sum((a - mean) ** 2 for a in advantages) / len(advantages)
        advantages = [(a - mean) / (variance + 1e-8) ** 0.5 for a in advantages]
    losses = []
    for k, (x, a) in enumerate(zip(torch.cat([row.token_ratios for row in rows]), advantages, strict=True)):
        ratio = x.exp()
        high, low = bool(ratio > o.clip_high), bool(ratio < o.clip_low)
        bound = o.clip_high if a > 0 and high else o.clip_low if a < 0 and low else None
        bites |= {f"{'+' if a > 0 else '-'} {'high' if high else 'low' if low else 'inside'}"}
        loss = -ratio * a if bound is None else torch.tensor(-bound * a, dtype=torch.float64)
        losses.append(loss + o.kl_coef * (ratio - 1 - x) + (o.critic_coef * critic[k] if critic else 0))
    return torch.stack(losses).mean()


class Naive:
    """The same run from the raw rows: one row at a time, no padding, whole logits."""

    def __init__(self, bench: Bench, case: str) -> None:
        self.o: Any = CASES[case]
        self.has_ref = self.o.needs_reference and case != "kto reference-free"
        self.tokenizer = AutoTokenizer.from_pretrained(bench.model)
        self.rows = [json.loads(line) for line in bench.file(self.o).read_text().splitlines()]
        self.model, self.reference = (
            AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float64).eval() for _ in range(2)
        )
        self.head = torch.nn.Linear(32, 1, dtype=torch.float64)
        for parameter in self.head.parameters():
            torch.nn.init.zeros_(parameter)
        self.seen: list[float] = []  # log-ratios, for BCO's mean
        self.bites: set[str] = set()  # the bounds that some token was outside of
        self.data = bench.data(bench.module(case))
        self.data.setup("fit")
        self.loader = self.data.train_dataloader()
        self.lr = LR * SLOWER.get(case, 1.0)

    def row(self, raw: dict[str, Any], completion: str) -> Row:
        desirable = raw.get("label", True)
        control = (self.o.good if desirable else self.o.bad) if isinstance(self.o, CSFT) else ""
        prompt = self.tokenizer(raw["prompt"] + control).input_ids
        ids = torch.tensor([prompt + self.tokenizer(completion).input_ids + [self.tokenizer.eos_token_id]])
        out = self.model(ids, output_hidden_states=True)
        place = slice(len(prompt) - 1, -1)
        value = self.head(out.hidden_states[-1][0, place])[:, 0] if getattr(self.o, "critic", False) else None
        with torch.no_grad():
            ref = self.reference(ids) if self.has_ref else None
        logps = [
            None if x is None else x.logits[0, place].log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
            for x in (out, ref)
        ]
        if (bounds := getattr(self.o, "humanline", None)) is not None:
            ratios = logps[0] - logps[1]  # type: ignore[operator]
            self.bites |= {
                name
                for name, k, sign in (("below", 0, -1), ("above", 1, 1))
                if (sign * ratios > sign * bounds[k]).any()
            }
        return Row(logps[0], logps[1], value, desirable, raw.get("score", 0.0), bounds)  # type: ignore[arg-type]

    def z0(self, indices: Sequence[int]) -> Tensor | float:
        if not self.o.reference_point:
            return 0.0
        with torch.no_grad():
            partners = [self.rows[self.loader.dataset.partners[i]]["completion"] for i in indices]  # type: ignore[attr-defined]
            assert all(y != self.rows[i]["completion"] for i, y in zip(indices, partners, strict=True))
            mean = torch.stack([self.row(self.rows[i], y).ratio for i, y in zip(indices, partners, strict=True)]).mean()
        return mean.clamp_min(0) if self.has_ref else mean

    def loss(self, indices: Sequence[int]) -> Tensor:
        raws = [self.rows[i] for i in indices]
        if self.o.view != "unpaired":
            rows = [self.row(raw, raw["chosen"]) for raw in raws]
            if isinstance(self.o, SFT):
                return -torch.cat([row.logp for row in rows]).mean()
            others = [self.row(raw, raw["rejected"]) for raw in raws]
            return torch.stack([of_pair(self.o, w, x) for w, x in zip(rows, others, strict=True)]).mean()
        rows = [self.row(raw, raw["completion"]) for raw in raws]
        if isinstance(self.o, CSFT):
            return -torch.cat([row.logp for row in rows]).mean()
        if isinstance(self.o, KTOv1):
            return of_halves(self.o, rows)
        if isinstance(self.o, PPOOffline):
            return of_tokens(self.o, rows, self.bites)
        if isinstance(self.o, BCO):
            self.seen += [row.ratio.item() for row in rows]
            z0: Tensor | float = sum(self.seen) / len(self.seen)
        else:
            z0 = self.z0(indices)
        return torch.stack([of_thumb(self.o, row, z0) for row in rows]).mean()

    def batches(self) -> Iterator[list[int]]:
        epoch = 0
        while True:
            self.loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            yield from self.loader.sampler
            epoch += 1

    def losses(self) -> list[float]:
        optimizer = torch.optim.SGD([*self.model.parameters(), *self.head.parameters()], lr=self.lr, momentum=0.9)
        out = []
        for _, indices in zip(range(STEPS), self.batches(), strict=False):
            loss = self.loss(indices)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            out.append(loss.item())
        return out


@pytest.mark.parametrize("case", CASES)
def test_training_follows_the_naive_loop(case: str, bench: Bench) -> None:
    naive = Naive(bench, case)
    truth, ours = naive.losses(), bench.losses(case)
    assert len(ours) == STEPS
    assert ours == pytest.approx(truth, abs=1e-9, rel=0)
    assert max(ours) - min(ours) > 1e-3, "nothing was learned, so nothing was tested"
    if getattr(CASES[case], "critic", False):
        assert all(x.detach().abs().max() > 1e-4 for x in naive.head.parameters()), "the critic learned"
    if getattr(CASES[case], "humanline", None):
        assert {"below", "above"} <= naive.bites
    if case in ("ppo", "ppo score", "ppo critic"):
        assert naive.bites >= {"+ high", "+ low", "- high", "- low"}


@pytest.mark.parametrize("case", [x for x, o in CASES.items() if x not in OF_THE_BATCH and not has_z0(o)])
def test_accumulation_does_not_change_it(case: str, bench: Bench) -> None:
    """Windows of two micro-batches, the last one of an epoch cut short."""
    assert bench.losses(case, accumulate=2) == pytest.approx(bench.losses(case), abs=1e-9, rel=0)


# -------------------------------------------------------------------------------------------------- passes and models


@dataclass
class Call:
    who: str
    rows: str
    grad: bool


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[AlignmentModule, Batch], list[Call]]:
    """The forward passes of one training step."""

    def count(module: AlignmentModule, batch: Batch) -> list[Call]:
        seen: list[Call] = []
        bodies: list[bool] = []
        forward = Scorer.forward

        def spy(self: Scorer, rows: Any, **options: Any) -> Any:
            who = {id(module.policy): "policy", id(module.reference): "reference"}[id(self)]
            what = {id(batch.completions): "y", id(batch.mismatched): "y'"}[id(rows)]
            seen.append(Call(who, what, torch.is_grad_enabled()))
            return forward(self, rows, **options)

        monkeypatch.setattr(Scorer, "forward", spy)
        hooks = [
            scorer.lm.transformer.register_forward_pre_hook(lambda *_: bodies.append(True))
            for scorer in (module.policy, module.reference)
            if scorer is not None
        ]
        module.train()
        module.training_step(batch, 0).backward()
        monkeypatch.undo()
        for hook in hooks:
            hook.remove()
        assert len(bodies) == len(seen), "each pass runs the model once"
        return seen

    return count


@pytest.mark.parametrize("case", CASES)
def test_a_step_runs_the_passes_of_the_table_and_no_other(case: str, bench: Bench, calls: Any) -> None:
    module = bench.module(case)
    module.configure_model()
    batch = bench.batch(module, length_groups=1)
    found = calls(module, batch)
    objective, free = CASES[case], case == "kto reference-free"
    number = int(cells(objective)[3].split(":")[0])
    assert len(found) == (2 if free else number)
    expected = [("policy", "y", True)]
    if objective.needs_reference and not free:
        expected += [("reference", "y", False)]
    if case.startswith("kto") and case not in ("kto v1", "kto without z0"):
        expected += [(who, "y'", False) for who in ("policy", "reference")][: 1 if free else 2]
    assert sorted((x.who, x.rows, x.grad) for x in found) == sorted(expected)
    assert (batch.mismatched is not None) == any(x.rows == "y'" for x in found)
    assert "y′" not in cells(objective)[3] or batch.mismatched is not None
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)


def test_the_numbers_of_the_table() -> None:
    """The step follows the table (above); these are the figures that it must hold."""
    passes = {x.__name__: int(cells(x())[3].split(":")[0]) for x in OBJECTIVES}
    two = dict.fromkeys(("DPO", "CDPO", "IPO", "PPOOffline", "KTOv1", "APOZero", "BCO"), 2)
    assert passes == {"KTO": 4} | two | dict.fromkeys(("SFT", "SimPO", "SLiC", "ORPO", "CSFT"), 1)


@pytest.mark.parametrize("case", CASES)
def test_models_are_loaded_once_and_a_reference_only_where_it_is_compared_with(
    case: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, loaded = halos_pl.scoring.pair.load_model, []

    def spy(source: Any) -> Any:
        loaded.append(source.name)
        return real(source)

    monkeypatch.setattr(halos_pl.scoring.pair, "load_model", spy)
    module = bench.module(case)
    module.configure_model()
    module.configure_model()
    assert loaded == [str(bench.model)]
    assert (module.reference is not None) == (CASES[case].needs_reference and case != "kto reference-free")
    assert module.policy is not None
    assert (module.policy.value_head is not None) == getattr(CASES[case], "critic", False)


# -------------------------------------------------------------------------------------------------- what must matter


def perturbed(bench: Bench, case: str, objective: Objective | None = None, **options: Any) -> AlignmentModule:
    """A policy that has left its reference."""
    module = bench.module(case, objective, **options)
    module.configure_model()
    assert module.policy is not None
    shake(module.policy, 0)
    return module


def shake(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.02)


def step_loss(module: AlignmentModule, batch: Batch) -> float:
    """What a training step differentiates."""
    module._step_mean.restart()
    if module.running_mean is not None:
        module.running_mean.total.fill_(8.0)
        module.running_mean.count.fill_(4.0)
    return module.train().training_step(batch, 0).item()


UNREAD = {
    "alpha": lambda o: o.value != KT,
    "loss_aversion": lambda o: o.value != KT,
    "gamma": lambda o: isinstance(o, PPOOffline) and not o.critic,
    "gae_lambda": lambda o: not o.critic,
    "critic_coef": lambda o: not o.critic,
}
"""Fields that an objective documents not to read."""
CLIPS = {"clip_low": 0.98, "clip_high": 1.02}
"""A bound that no token reaches changes nothing."""
NUMBERS = [
    (case, field.name)
    for case, objective in CASES.items()
    for field in fields(objective)
    if isinstance(getattr(objective, field.name), float)
    or (field.name == "humanline" and case != "kto reference-free")  # refused: tests/test_needs.py
]


@pytest.fixture(scope="module")
def scenes(bench: Bench) -> Callable[[str], tuple[AlignmentModule, Batch, float]]:
    """A perturbed module of a case, a batch, and the loss; made once."""
    made: dict[str, tuple[AlignmentModule, Batch, float]] = {}

    def get(case: str) -> tuple[AlignmentModule, Batch, float]:
        if case not in made:
            module = perturbed(bench, case)
            batch = bench.batch(module)
            made[case] = module, batch, step_loss(module, batch)
        module, _, _ = made[case]
        module.objective = CASES[case]
        return made[case]

    return get


@pytest.mark.parametrize(("case", "name"), NUMBERS)
def test_every_number_of_an_objective_changes_its_loss(case: str, name: str, scenes: Any) -> None:
    module, batch, loss = scenes(case)
    objective = CASES[case]
    value = getattr(objective, name)
    if name == "humanline":
        other: Any = None if value else NARROW
    else:
        other = CLIPS.get(name, 0.75 * value if value else 0.25)
    module.objective = replace(objective, **{name: other})  # type: ignore[type-var]
    changed = step_loss(module, batch)
    if name in UNREAD and UNREAD[name](objective):
        assert changed == loss
    else:
        assert abs(changed - loss) > 1e-6


def test_control_texts_change_the_loss(bench: Bench, scenes: Any) -> None:
    module, _, loss = scenes("csft")
    for changed in (CSFT(good="<|yes|>"), CSFT(bad="<|no|>")):
        assert abs(step_loss(module, bench.batch(bench.module("csft", changed))) - loss) > 1e-6


WEIGHTED = [case for case, objective in CASES.items() if hasattr(objective, "desirable_weight")]


@pytest.mark.parametrize("side", ["desirable", "undesirable"])
@pytest.mark.parametrize("case", WEIGHTED)
def test_class_weights_weigh_their_own_class(case: str, side: str, scenes: Any) -> None:
    module, batch, _ = scenes(case)
    step_loss(module, batch)  # sets BCO's running mean
    module.eval()
    with torch.no_grad():
        losses = module.evaluate(batch).losses
        name = f"{side}_weight"
        module.objective = replace(CASES[case], **{name: 3 * getattr(CASES[case], name)})
        weighted = module.evaluate(batch).losses
    own = batch.desirable if side == "desirable" else ~batch.desirable
    assert own.any()
    assert not own.all()
    torch.testing.assert_close(weighted, torch.where(own, 3 * losses, losses), atol=1e-12, rtol=0)
    assert (losses.abs() > 1e-9).all()


@pytest.mark.parametrize("case", [x for x, o in CASES.items() if has_z0(o)])
def test_z0_is_of_the_mismatched_rows_and_changes_the_loss(
    case: str, scenes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch, loss = scenes(case)
    _, raw = module.estimate_z0(batch.mismatched)
    score = module.score

    def shifted(rows: Any, **options: Any) -> Any:
        scores = score(rows, **options)
        return replace(scores, logratio=scores.logratio + 1.0) if rows is batch.mismatched else scores

    with monkeypatch.context() as patch:
        patch.setattr(module, "score", shifted)
        z0, higher = module.estimate_z0(batch.mismatched)
        assert higher.item() == pytest.approx(raw.item() + 1)
        assert z0.item() == pytest.approx(higher.item() if case == "kto reference-free" else max(0.0, higher.item()))
        assert abs(step_loss(module, batch) - loss) > 1e-3
    assert step_loss(module, batch) == loss
    assert abs(step_loss(module, replace(batch, mismatched=batch.completions)) - loss) > 1e-6


@pytest.mark.parametrize("case", [x for x, o in CASES.items() if o.needs_reference and x != "kto reference-free"])
def test_the_reference_changes_the_loss(case: str, bench: Bench, other_model: Path, scenes: Any) -> None:
    """From another folder; both models are then loaded."""
    module = perturbed(bench, case, reference=str(other_model))
    assert module.reference is not None
    _, batch, loss = scenes(case)
    assert abs(step_loss(module, batch) - loss) > 1e-6


@pytest.mark.parametrize("case", [x for x, o in CASES.items() if not o.needs_reference])
def test_a_reference_without_a_use_is_refused(case: str, bench: Bench, other_model: Path, scenes: Any) -> None:
    with pytest.raises(ValueError, match=f"{type(CASES[case]).__name__} compares with no reference"):
        bench.module(case, reference=str(other_model))
    module = perturbed(bench, case, reference="none")
    assert step_loss(module, scenes(case)[1]) == scenes(case)[2], "and leaving it out is what happens anyway"


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    shake(model, 1)
    model.save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------------------- the same rows


@pytest.mark.parametrize("view", ["paired", "unpaired"])
def test_one_seed_is_one_order_for_all_objectives_of_a_view(view: str, bench: Bench) -> None:
    """What differs between two runs is then the objective alone. KTO v1 draws equal halves."""
    cases = [x for x, o in CASES.items() if o.view == view and not o.equal_halves]
    assert len(cases) > 5
    seen = {}
    for case in cases:
        data = bench.data(bench.module(case))
        data.setup("fit")
        loader, orders, batches = data.train_dataloader(), [], []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            orders.append([row for batch in loader.sampler for row in batch])
            for batch in loader:
                batches.append((batch.completions.targets.tolist(), batch.completions.cu_seqlens.tolist()))
                if not isinstance(batch, PairedBatch):
                    batches[-1] += (batch.desirable.tolist(),)
                if case != "csft":  # its prompts end in a control text
                    batches[-1] += ([block.tolist() for block in batch.completions.blocks],)
                else:
                    batches[-1] += (seen[cases[0]][1][len(batches) - 1][-1],)
        assert orders[0] != orders[1]
        seen[case] = orders, batches
    assert all(seen[case] == seen[cases[0]] for case in cases)
