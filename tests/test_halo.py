"""Verdicts are those of the KTO paper's definition 3.4, each witness worked out by hand."""

from __future__ import annotations

import doctest
import importlib
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from halos_pl.halo import WITNESSES, Verdict, Witness, check, table
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
    PPOOffline,
    SimPO,
    SLiC,
)
from halos_pl.value import kahneman_tversky

NEGATIVE, CONSTANT, TWO = "l < 0 for undesirable", "constant reference point", "v differs by label"
# HALO, convex in losses, loss-averse, remark
VERDICTS = {
    "KTO": (True, True, False, ""),
    "KTO(value='log_logistic')": (True, False, True, NEGATIVE),
    "KTO(value='identity')": (True, True, False, ""),
    "KTO(value='kahneman_tversky')": (True, True, True, NEGATIVE),
    "DPO": (True, False, True, ""),
    "CDPO": (True, False, True, "on data with 0.1 of each pair reversed"),
    "IPO": (False, False, True, "v rises and falls"),
    "PPOOffline": (True, False, True, f"{NEGATIVE}; {TWO}; {CONSTANT}"),
    "KTOv1": (True, True, False, ""),
    "APOZero": (True, True, False, CONSTANT),
    "BCO": (True, False, True, NEGATIVE),
}
NOT_LOG_RATIOS = {"KTO(no reference)", "SFT", "SimPO", "SLiC", "ORPO", "CSFT"}
MARKS = {True: "✓", False: "–", None: ""}


def outcome(verdict: Verdict) -> tuple[bool | None, ...]:
    return verdict.rebuilt, verdict.non_decreasing, verdict.concave_on_gains, verdict.is_halo


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_every_row_of_the_table():
    head, _, *rows = map(cells, table().splitlines())
    assert head[:3] == ["name", "log ratios only", "rebuilt"]
    assert head[3:5] + head[7:] == ["non decreasing", "concave on gains", "is halo", "remark"]
    assert [row[0] for row in rows] == [
        *("KTO", "KTO(value='log_logistic')", "KTO(value='identity')", "KTO(value='kahneman_tversky')"),
        *("KTO(no reference)", *(x.__name__ for x in OBJECTIVES if x is not KTO)),
    ]
    for name, *row in rows:
        if name in NOT_LOG_RATIOS:
            assert row == ["–", *[""] * 5, "–", "reads more than log-ratios"]
            continue
        halo, convex, averse, remark = VERDICTS[name]
        rises = MARKS[name != "IPO"]
        wider = halo and ("l < 0" in remark or "differs by label" in remark)
        verdict = "(✓)" if wider else MARKS[halo]
        assert row == ["✓", "✓", rises, "✓", MARKS[convex], MARKS[averse], verdict, remark], name


def test_exactly_these_read_more_than_log_ratios():
    failing = {cls.__name__ for cls in OBJECTIVES if not check(cls()).log_ratios_only}
    assert failing == NOT_LOG_RATIOS - {"KTO(no reference)"}
    assert not check(KTO(), reference=False).log_ratios_only
    for cls in (SFT, CSFT, SLiC, ORPO, SimPO):
        assert check(cls()).is_halo is False


@pytest.mark.parametrize(
    "objective",
    [
        *(KTO(0.7, 1.5, 0.25, value=v) for v in ("logistic", "log_logistic", "identity", "kahneman_tversky")),
        KTO(2.0, 0.0, 3.0, reference_point=False),
        KTO(value="kahneman_tversky", alpha=0.4, loss_aversion=5.0),
        APOZero(0.02, 1.2, 0.3),
        KTO(0.02, 1.2, 0.3, value="log_logistic", reference_point=False),
        BCO(0.5, 1.4, 0.6),
        KTOv1(1.1),
        DPO(1.7),
        CDPO(0.4, epsilon=0.3),
        CDPO(epsilon=0.0),
        PPOOffline(clip_low=0.8, clip_high=1.2),
        PPOOffline(clip_low=1.0, clip_high=1.0),
    ],
    ids=str,
)
def test_the_witness_holds_with_other_hyperparameters(objective):
    verdict = check(objective)
    assert verdict.rebuilt, verdict
    assert verdict.is_halo, verdict


@pytest.mark.parametrize("tau", [0.01, 0.1, 3.0, 1e-4])
def test_ipo_falls_beyond_any_margin(tau):
    verdict = check(IPO(tau=tau))
    assert (verdict.rebuilt, verdict.non_decreasing, verdict.is_halo) == (True, False, False)


def kto(beta: float = 0.1, **changes) -> Witness:
    witness = Witness(a=lambda y: y.either(-1, 1), l=beta, reference_point=lambda y: beta * y.z0, v=torch.sigmoid)
    return replace(witness, **changes)


@pytest.mark.parametrize(
    ("objective", "witness"),
    [
        (KTO(), kto(a=-1.0)),
        (KTO(), kto(a=lambda y: y.either(1, -1))),
        (KTO(), kto(l=1.0)),
        (KTO(), kto(l=lambda y: y.either(0.1, -0.1))),
        (KTO(), kto(reference_point=0.0)),
        (KTO(), kto(reference_point=lambda y: y.z0)),
        (KTO(), kto(v=logsigmoid)),
        (KTO(), kto(v=torch.tanh)),
        (KTO(), kto(v=torch.sqrt)),
        (KTO(), kto(v=lambda z: torch.sigmoid(z) + 1e-6 * z)),
        (KTO(undesirable_weight=1.5), kto()),
        (KTO(), kto(a=lambda y: y.either(-2, 2), v=lambda z: torch.sigmoid(z) / 2)),
        (KTO(), kto(a=lambda y: y.either(1, -1), weight=-1.0)),
        (KTO(), kto(l=lambda y: y.logratio / 10, v=torch.sign)),
        (KTO(value="log_logistic"), kto(v=logsigmoid)),
        (KTO(value="kahneman_tversky"), kto(v=kahneman_tversky)),
        (KTOv1(), kto()),
        (DPO(), Witness(l=1.0, reference_point=lambda y: y.other, v=logsigmoid)),
        (DPO(), Witness(l=0.1, reference_point=0.0, v=logsigmoid)),
        (DPO(), Witness(a=1.0, l=0.1, reference_point=lambda y: 0.1 * y.other, v=logsigmoid)),
        (CDPO(), Witness(l=0.1, reference_point=lambda y: 0.1 * y.other, v=logsigmoid)),
        (CDPO(), Witness(l=0.1, reference_point=lambda y: 0.1 * y.other, v=logsigmoid, reversed_share=0.2)),
    ],
)
def test_a_wrong_witness_is_refused(objective, witness):
    verdict = check(objective, witness)
    assert verdict.log_ratios_only
    assert verdict.rebuilt is False
    assert verdict.is_halo is None
    assert verdict.remark == "the witness does not rebuild the loss"


def test_the_policy_must_not_hide_in_what_belongs_to_the_data():
    """sign(z)·|z| is z: with weight |z| and v = sign the loss is rebuilt, and still this is no witness."""
    witness = kto(v=torch.sign, weight=lambda y: (0.1 * (y.logratio - y.z0)).abs())
    assert check(KTO(value="identity"), witness).rebuilt is False


def test_with_a_positive_l_the_undesirable_need_a_value_that_is_convex_in_gains():
    """With a = +1 and l > 0 the undesirable's value is −v(−z), wherever the reference point lies."""
    verdict = check(KTO(value="log_logistic"), kto(v=logsigmoid, v_undesirable=softplus))
    assert outcome(verdict) == (True, True, False, None)
    for c in (-3.0, 2.0):
        moved = kto(
            v=lambda z, c=c: logsigmoid(z + c),
            v_undesirable=lambda z, c=c: softplus(z + c),
            reference_point=lambda y, c=c: 0.1 * y.z0 + c,
        )
        verdict = check(KTO(value="log_logistic"), moved)
        assert (verdict.rebuilt, verdict.concave_on_gains) == (True, False)
    mirrored = check(
        KTO(value="kahneman_tversky"), kto(v=kahneman_tversky, v_undesirable=lambda z: -kahneman_tversky(-z))
    )
    assert (mirrored.is_halo, mirrored.loss_averse, mirrored.remark) == (True, False, TWO)


def ppo(**changes) -> Witness:
    return replace(WITNESSES[PPOOffline](PPOOffline()), **changes)


def test_offline_ppo_needs_its_kinks_and_a_negative_l():
    zero = ppo(
        reference_point=0.0,
        v=lambda z: z.clamp(max=math.log(2)).exp(),
        v_undesirable=lambda z: -(-z).exp().clamp(min=0.5),
    )
    verdict = check(PPOOffline(), zero)
    assert outcome(verdict) == (True, True, False, None)
    for c in (math.log(0.5), 0.0, 3.0):
        positive = ppo(
            a=lambda y: y.either(-1, +1),
            l=1.0,
            reference_point=lambda y, c=c: y.either(math.log(2), c),
            v_undesirable=lambda z, c=c: (z + c).exp().clamp(min=0.5),
        )
        verdict = check(PPOOffline(), positive)
        assert (verdict.rebuilt, verdict.concave_on_gains, verdict.is_halo) == (True, False, None), c
    falling = ppo(
        l=1.0, reference_point=lambda y: y.either(math.log(2), 0.0), v_undesirable=lambda z: -z.exp().clamp(min=0.5)
    )
    verdict = check(PPOOffline(), falling)
    assert outcome(verdict) == (True, False, True, None)


def test_cdpo_of_one_pair_rises_and_falls():
    def v(z):
        return 0.9 * logsigmoid(z) + 0.1 * logsigmoid(-z)

    verdict = check(CDPO(), Witness(l=0.1, reference_point=lambda y: 0.1 * y.other, v=v))
    assert (verdict.rebuilt, verdict.non_decreasing, verdict.is_halo) == (True, False, False)


@dataclass(frozen=True)
class Own(KTO):
    """A human value function f(z), and a loss of it: −f for desirable, f(z) for undesirable ones."""

    shape: str = "tanh"

    def losses(self, scores, desirable, z0):
        z = self.beta * (scores.logratio - z0)
        return torch.where(desirable, -1, 1) * SHAPES[self.shape](z)


SHAPES = {
    "tanh": torch.tanh,
    "falling": lambda z: -torch.tanh(z),
    "exp": torch.exp,
    "softplus": softplus,
    "dip": lambda z: torch.tanh(z) - 0.2 * torch.exp(-((z - 2) ** 2) * 20),
    "flat": lambda z: 0 * z,
    "dent": lambda z: z - 0.5 * (z - 3).clamp(min=0) + 0.4 * (z - 4).clamp(min=0),
    "losses only": lambda z: torch.where(z > 0, z, torch.sin(z) * 0.5 + z),
}


@pytest.mark.parametrize(
    ("shape", "non_decreasing", "concave", "halo"),
    [
        ("tanh", True, True, True),
        ("falling", False, False, None),
        ("exp", True, False, None),
        ("softplus", True, False, None),
        ("dip", False, False, False),
        ("flat", True, True, True),
        ("dent", True, False, None),
        ("losses only", True, True, True),
    ],
)
def test_a_value_function_of_ones_own(shape, non_decreasing, concave, halo):
    verdict = check(Own(shape=shape), kto(v=SHAPES[shape]))
    assert outcome(verdict) == (True, non_decreasing, concave, halo)


def test_without_a_witness_it_is_open():
    verdict = check(Own())
    assert (verdict.name, verdict.log_ratios_only, verdict.rebuilt, verdict.is_halo) == ("Own", True, None, None)
    assert verdict.remark == "no witness"
    assert check(PPOOffline(kl_coef=0.1)).is_halo is None
    assert check(PPOOffline(reward="score")).is_halo is None
    clamped = check(DPO(humanline=(-1.0, 1.5)))
    assert (clamped.log_ratios_only, clamped.is_halo) == (True, None)
    assert clamped.remark == "clamps every token: r is not log π/π_ref"


@dataclass(frozen=True)
class Reads(DPO):
    field: str = "logp"

    def losses(self, scores, desirable=None, z0=None):
        x = getattr(scores, self.field)
        more = x.mean() if x.shape == scores.token_logp.shape else x.chunk(2)[0]
        return super().losses(scores) + 1e-6 * more


@pytest.mark.parametrize("field", ["logp", "ref_logp", "token_logp", "entropy", "value"])
def test_a_loss_that_reads_anything_else_is_none(field):
    verdict = check(Reads(field=field), WITNESSES[DPO](DPO()))
    assert verdict.name == ("Reads" if field == "logp" else f"Reads(field={field!r})")
    assert (verdict.log_ratios_only, verdict.is_halo) == (False, False)


@pytest.mark.parametrize("field", ["logratio", "token_logratio", "length", "score"])
def test_log_ratios_and_data_are_free(field):
    assert check(Reads(field=field)).log_ratios_only


def test_a_constant_may_depend_on_the_data_and_never_on_the_policy():
    dpo = WITNESSES[DPO](DPO())
    assert check(Reads(field="length"), dpo).is_halo
    assert check(Reads(field="logratio"), dpo).rebuilt is False


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("halos_pl.halo"))
    assert result.attempted
    assert not result.failed
