"""Is a loss a human-aware loss (HALO)? Definition 3.4 of the KTO paper (Ethayarajh et al. 2024), checked in float64:

    f = E_D[a(x, y)·v(r(x, y) − E_Q r(x, y′))] + C        r(x, y) = l(y)·log π(y|x)/π_ref(y|x)

with a ∈ {−1, +1}, a reference distribution Q, a human value v that never falls and is concave in gains (0, ∞), and C of
the data alone. How v bends in losses, and whether they loom larger than gains, is reported and is no criterion.

First, the loss may read log-ratios only: policy and reference are made likelier together, and nothing may change. The
first report took SLiC for a HALO, with a uniform reference; its loss reads log π, and by the definition it is none.
Second, a `Witness` declares a, l, E_Q r and v. The loss rebuilt from it must be the shipped one, and v is tested alone.
A witness proves a HALO. One that fails proves nothing about others, unless its v rises and falls: then the loss rises
and falls with r(x, y), which no a, l, Q and v that never falls can do.

A verdict says where a witness strays from the paper, which wants l > 0: else −v(−z) takes v's place for undesirable
completions, convex in gains for v = log σ or PPO's. A constant reference point is E_Q r of no Q that all share.

A human value of your own:
    >>> @dataclass(frozen=True)
    ... class Arctan(KTO):
    ...     @property
    ...     def human_value(self):
    ...         return torch.atan
    >>> witness = Witness(a=lambda y: y.either(-1, +1), l=0.1, reference_point=lambda y: 0.1 * y.z0, v=torch.atan)
    >>> check(Arctan(beta=0.1), witness).is_halo
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos_pl.batch import CompletionLogps
from halos_pl.losses import BCO, CDPO, DPO, IPO, KTO, OBJECTIVES, APOZero, KTOv1, Objective, PPOOffline
from halos_pl.losses.kto import ValueName
from halos_pl.value import kahneman_tversky

TOLERANCE, ROUNDING = 1e-9, 16 * torch.finfo(torch.float64).eps
"""Of losses, relative to 1 + |loss|, and of the slopes of v, relative; and of v, relative to 1 + |v|."""
SIZES = torch.logspace(-4, 6, 1001, dtype=torch.float64)
"""Of the gains and losses at which v is tested, closer together towards 0; left out where v is infinite in float64."""
ROWS, LONGEST, SEEDS, SCALES = 16, 6, 4, (0.1, 1.0, 16.0)
"""Of the random scores. No token's log-ratio is larger, in nats: offline PPO goes on as a straight line from 20."""


@dataclass(frozen=True)
class Completions:
    """What a witness reads: the completion y of each loss, [B] (a pair's chosen one) or [N] tokens, in float64."""

    logratio: Tensor  # log π/π_ref
    other: Tensor  # of the other completion of the pair; NaN without pairs
    length: Tensor
    other_length: Tensor
    desirable: Tensor  # bool
    z0: Tensor  # 0-d, as the step hands it in; 0 if it hands in none

    def either(self, desirable: float, undesirable: float) -> Tensor:
        """One number or the other, by the label."""
        return torch.where(self.desirable, desirable, torch.full_like(self.logratio, undesirable))


Of = float | Callable[[Completions], Tensor]
Value = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Witness:
    """What makes a loss a HALO: it is weight·a·v(l·logratio − reference_point), up to a constant of the data.

    Args:
        l: Scale of the implied reward; a number or a function of the data, never of the policy.
        reference_point: E_Q r(x, y′), in units of the reward.
        v: Human value function.
        a: −1 or +1.
        weight: Of the example in the data, ≥ 0: class weights only reweigh D.
        v_undesirable: Where undesirable completions have another human value function.
        reversed_share: The data hold every pair the other way round too, with this share of its weight.
    """

    l: Of  # noqa: E741 (the paper's letter)
    reference_point: Of
    v: Value
    a: Of = -1.0
    weight: Of = 1.0
    v_undesirable: Value | None = None
    reversed_share: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """None stands for what was not tested, or is open."""

    name: str
    log_ratios_only: bool
    rebuilt: bool | None = None
    non_decreasing: bool | None = None
    concave_on_gains: bool | None = None
    convex_in_losses: bool | None = None
    loss_averse: bool | None = None
    is_halo: bool | None = None
    remark: str = ""


def check(objective: Objective, witness: Witness | None = None, *, reference: bool = True) -> Verdict:
    """Whether an objective is a human-aware loss (KTO paper, definition 3.4; see the module).

    Args:
        objective: Any, with its hyperparameters.
        witness: Of that objective with those hyperparameters; None takes ours where `WITNESSES` has its very class.
        reference: Whether the run has a reference model.

    Returns:
        `is_halo` is True with a witness, False where none can be, None where that is open.
    """
    reference = reference and objective.needs_reference
    name = _name(objective, reference)
    draws = (draw for seed in range(SEEDS) for draw in _draws(objective, seed, reference))
    if not all(_same(loss, twin, loss) for _, loss, twin in draws):
        return Verdict(name, False, is_halo=False, remark="reads more than log-ratios")
    if objective.token_clamp is not None:
        return Verdict(name, True, remark="clamps every token: r is not log π/π_ref")
    witness = witness or WITNESSES.get(type(objective), lambda objective: None)(objective)
    if witness is None:
        return Verdict(name, True, remark="no witness")
    remarks = _rebuild(objective, witness)
    shapes = [_shape(v) for v in (witness.v, witness.v_undesirable) if v]
    rises, concave, convex, averse = (all(x) for x in zip(*(shape[1:] for shape in shapes), strict=True))
    verdict = partial(Verdict, name, True, remarks is not None, rises, concave, convex, averse)
    if remarks is None:
        return verdict(remark="the witness does not rebuild the loss")
    if not witness.reversed_share and not all(up or down for down, up, *_ in shapes):
        return verdict(is_halo=False, remark="v rises and falls")
    return verdict(is_halo=True if rises and concave else None, remark="; ".join(remarks))


def table() -> str:
    """The verdicts on all objectives, in Markdown: ✓ yes, (✓) in a wider reading, – no, blank for not tested."""
    verdicts = [*(check(KTO(value=value)) for value in get_args(ValueName)), check(KTO(), reference=False)]
    verdicts += [check(cls()) for cls in OBJECTIVES if cls is not KTO]
    marks, rows = {True: "✓", False: "–", None: ""}, [[x.name.replace("_", " ") for x in fields(Verdict)]]
    rows.append(["---"] * len(rows[0]))
    for v in verdicts:
        wider = {"is_halo": "(✓)"} if v.is_halo and ("l < 0" in v.remark or "by label" in v.remark) else {}
        rows.append([marks.get(cell, cell) for cell in (vars(v) | wider).values()])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _kto(objective: Any) -> Witness:
    """Undesirable completions have −v(−z): v(z) up to a constant if v is symmetric about a point; else l < 0."""
    values = {"logistic": torch.sigmoid, "log_logistic": logsigmoid, "identity": torch.clone}
    beta, value = objective.beta, getattr(objective, "value", "log_logistic")
    a, scale = (+1, beta) if value in ("logistic", "identity") else (-1, -beta)
    return Witness(
        a=lambda y: y.either(-1, a),
        l=lambda y: y.either(beta, scale),
        reference_point=lambda y: y.either(beta, scale) * y.z0,
        v=values.get(value) or partial(kahneman_tversky, alpha=objective.alpha, loss_aversion=objective.loss_aversion),
        weight=lambda y: y.either(objective.desirable_weight, objective.undesirable_weight),
    )


def _kto_v1(objective: KTOv1) -> Witness:
    def other_half(y: Completions) -> Tensor:
        up, down = (objective.beta * y.logratio[half].mean().clamp_min(0) for half in (y.desirable, ~y.desirable))
        return torch.where(y.desirable, down, up)

    return Witness(a=lambda y: y.either(-1, +1), l=objective.beta, reference_point=other_half, v=torch.sigmoid)


def _dpo(objective: DPO) -> Witness:
    beta, share = objective.beta, getattr(objective, "epsilon", 0.0)
    return Witness(l=beta, reference_point=lambda y: beta * y.other, v=logsigmoid, reversed_share=share)


def _ipo(objective: IPO) -> Witness:
    margin = 1 / (2 * objective.tau)
    point = lambda y: y.other / y.other_length  # noqa: E731
    return Witness(l=lambda y: 1 / y.length, reference_point=point, v=lambda z: -((z - margin) ** 2))


def _ppo(objective: PPOOffline) -> Witness | None:
    """Of each token. The clip is the reference point: beyond it all gains are worth the same."""
    low, high = objective.clip_low, objective.clip_high
    if objective.critic or objective.kl_coef or objective.needs_scores:
        return None
    return Witness(
        l=lambda y: y.either(+1, -1),
        reference_point=lambda y: y.either(math.log(high), -math.log(low)),
        v=lambda z: high * z.clamp(max=0).exp(),
        v_undesirable=lambda z: -low * (-z).clamp(min=0).exp(),
    )


WITNESSES: dict[type[Objective], Callable[[Any], Witness | None]] = {
    **dict.fromkeys((KTO, APOZero, BCO), _kto),
    **dict.fromkeys((DPO, CDPO), _dpo),
    KTOv1: _kto_v1,
    IPO: _ipo,
    PPOOffline: _ppo,
}
"""Ours, by the very class: a subclass may have another loss."""


def _name(objective: Objective, reference: bool) -> str:
    """With the hyperparameters that are not the defaults."""
    told = [f"{x.name}={y!r}" for x in fields(objective) if (y := getattr(objective, x.name)) != x.default]
    told += ["no reference"] if objective.needs_reference and not reference else []
    return type(objective).__name__ + (f"({', '.join(told)})" if told else "")


def _draws(objective: Objective, seed: int, reference: bool = True) -> Iterator[tuple[Completions, Tensor, Tensor]]:
    """By several policies on the same data: completions, their losses, and their losses by another policy and reference
    with the same log-ratios."""
    rng, token, paired = torch.Generator().manual_seed(seed), objective.unit == "token", objective.view == "paired"
    uniform = partial(torch.rand, generator=rng, dtype=torch.float64)
    length, score = torch.randint(1, LONGEST + 1, (ROWS,), generator=rng), uniform(ROWS) - 0.5
    row = torch.arange(ROWS).repeat_interleave(length)
    desirable = (torch.arange(ROWS) if paired else torch.randperm(ROWS, generator=rng)) < ROWS // 2
    mine = row if token else torch.arange(ROWS // 2 if paired else ROWS)
    other = mine if token or not paired else mine + ROWS // 2

    def scores(r: Tensor) -> CompletionLogps:
        token_logp = r.clamp(max=0) - uniform(len(r))  # neither probability is above 1
        logratio, logp = (torch.zeros_like(score).index_add(0, row, x) for x in (r, token_logp))
        more = {"entropy": uniform(len(r)), "value": uniform(len(r)), "score": score}
        if not reference:
            return CompletionLogps(logp / length, logp, length, token_logp, **more)
        return CompletionLogps(logratio, logp, length, token_logp, logp - logratio, r, **more)

    for scale in SCALES:
        r, point = scale * (2 * uniform(len(row)) - 1), scale * uniform(())
        z0 = None if objective.reference_point_from == "none" else point
        one, two = scores(r), scores(r)
        loss, twin = (objective.losses(x, None if objective.view == "sft" else desirable, z0) for x in (one, two))
        logratio = r if token else one.logratio[mine]
        against = torch.full_like(logratio, math.nan) if other is mine else one.logratio[other]
        sizes = length.double()[mine], length.double()[other]
        yield Completions(logratio, against, *sizes, desirable[mine], 0 * point if z0 is None else z0), loss, twin


def _rebuild(objective: Objective, witness: Witness) -> list[str] | None:
    """None where the loss less the witness's is not the same for all policies; else what to say of the witness."""
    negative, fixed = list[bool](), True
    for seed in range(SEEDS):
        first: tuple[Tensor, ...] = ()
        for y, loss, _ in _draws(objective, seed):
            declared = torch.stack([_of(x, y) for x in (witness.l, witness.a, witness.weight)])
            rest, point, (scale, a, weight) = loss - _value(witness, y), _of(witness.reference_point, y), declared
            first = first or (declared, rest, point)
            fair = torch.equal(declared, first[0]) and bool(((a.abs() == 1) & (weight >= 0)).all())
            if not (fair and _same(rest, first[1], loss)):
                return None
            negative += y.desirable[scale < 0].tolist()
            fixed = fixed and torch.equal(point, first[2])
    remarks = {
        "l < 0" if any(negative) else "l < 0 for undesirable": negative,
        "v differs by label": witness.v_undesirable,
        f"on data with {witness.reversed_share:g} of each pair reversed": witness.reversed_share,
        "constant reference point": fixed,
    }
    return [remark for remark, true in remarks.items() if true]


def _value(witness: Witness, y: Completions) -> Tensor:
    z = _of(witness.l, y) * y.logratio - _of(witness.reference_point, y)
    value = torch.where(y.desirable, witness.v(z), (witness.v_undesirable or witness.v)(z))
    value = _of(witness.weight, y) * _of(witness.a, y) * value
    if not (share := witness.reversed_share):
        return value
    back = replace(y, logratio=y.other, other=y.logratio, length=y.other_length, other_length=y.length)
    return (1 - share) * value + share * _value(replace(witness, reversed_share=0.0), back)


def _of(x: Of, y: Completions) -> Tensor:
    return x(y).expand_as(y.logratio) if callable(x) else torch.full_like(y.logratio, x)


def _same(x: Tensor, y: Tensor, loss: Tensor) -> bool:
    return x.shape == y.shape and bool(((x - y).abs() <= TOLERANCE * (1 + loss.abs())).all())


def _shape(v: Value) -> tuple[bool, ...]:
    """Whether v never rises, never falls, is concave in gains, convex in losses, and averse to losses."""
    sizes = SIZES[~(v(SIZES).isinf() | v(-SIZES).isinf())]
    z, n = torch.cat([-sizes.flip(0), sizes.new_zeros(1), sizes]), len(sizes)
    value, step = v(z), z.diff()
    rounding = ROUNDING * (1 + value.abs())
    slope, noise = value.diff() / step, torch.maximum(rounding[1:], rounding[:-1]) / step
    slack = TOLERANCE * torch.maximum(slope[1:].abs(), slope[:-1].abs()) + noise[1:] + noise[:-1]
    concave, convex = slope.diff() <= slack, slope.diff() >= -slack
    averse = (value[n] - value).flip(0)[n + 1 :] > (value - value[n] + rounding.flip(0))[n + 1 :]
    tests = ~(slope > noise), slope >= -noise, concave[n + 1 :], convex[: n - 1], averse
    return tuple(bool(x.all()) for x in tests)
