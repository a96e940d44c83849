from __future__ import annotations

import dataclasses
import math
import pathlib
import re

import pytest
import torch

import halos_pl.losses
from halos_pl.losses import KTO, OBJECTIVES, Objective
from halos_pl.losses.checks import check_floating, check_positive

DECLARED = ("view", "unit", "needs_reference", "reference_free", "length_normalised", "equal_halves")


def test_what_each_declares():
    declared = {x.__name__: tuple(getattr(x, name) for name in DECLARED) for x in OBJECTIVES}
    assert declared == {
        "KTO": ("unpaired", "example", True, "mean_logp", False, False),
        "DPO": ("paired", "example", True, "refused", False, False),
        "SFT": ("sft", "token", False, "refused", False, False),
        "CDPO": ("paired", "example", True, "refused", False, False),
        "IPO": ("paired", "example", True, "refused", True, False),
        "SimPO": ("paired", "example", False, "refused", True, False),
        "SLiC": ("paired", "example", False, "refused", False, False),
        "ORPO": ("paired", "example", False, "refused", True, False),
        "PPOOffline": ("unpaired", "token", True, "refused", False, False),
        "CSFT": ("unpaired", "token", False, "refused", False, False),
        "KTOv1": ("unpaired", "example", True, "refused", False, True),
        "APOZero": ("unpaired", "example", True, "refused", False, False),
        "BCO": ("unpaired", "example", True, "refused", False, False),
    }
    sources = {x.__name__: x().reference_point_from for x in OBJECTIVES if x().reference_point_from != "none"}
    assert sources == {"KTO": "mismatched", "BCO": "running_mean"}


def test_all_have_a_formula_and_a_source_for_the_table():
    assert all(x.formula and x.source for x in OBJECTIVES)
    assert len({x.formula for x in OBJECTIVES}) == len(OBJECTIVES)


@pytest.mark.parametrize("cls", OBJECTIVES)
def test_frozen_and_built_without_arguments(cls):
    objective = cls()
    assert isinstance(objective, Objective)
    assert objective == cls()
    assert not {f.name for f in dataclasses.fields(objective)} & set(DECLARED)
    for field in dataclasses.fields(objective):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(objective, field.name, 1.0)


@pytest.mark.parametrize("cls", OBJECTIVES)
def test_every_field_is_documented_for_the_cli(cls):
    for field in dataclasses.fields(cls):
        assert re.search(rf"^ +{field.name}: \S", cls.__doc__, re.MULTILINE), f"{cls.__name__}.{field.name}"


def test_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Objective()


def test_contents_page_is_complete():
    assert all(hasattr(halos_pl.losses, name) for name in halos_pl.losses.__all__)
    assert {x.__name__ for x in OBJECTIVES} < set(halos_pl.losses.__all__)


def test_cli_selects_by_class_path_and_refuses_what_is_out_of_range():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Objective, "objective")
    path = "halos_pl.losses.KTO"
    args = parser.parse_args([f"--objective={path}", "--objective.beta=0.25", "--objective.value=identity"])
    assert parser.instantiate(args).objective == KTO(beta=0.25, value="identity")
    with pytest.raises(jsonargparse.ArgumentError, match="gamma"):
        parser.parse_args([f"--objective={path}", "--objective.gamma=0.25"])
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        parser.instantiate(parser.parse_args([f"--objective={path}", "--objective.beta=-1"]))


@pytest.mark.parametrize("value", [1, 0.5, 1e-9])
def test_positive(value):
    check_positive("x", value)
    check_positive("x", 0, or_zero=True)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, None, "1"])
def test_not_positive(value):
    with pytest.raises(ValueError, match=re.escape(f"x must be a finite number > 0, got {value!r}")):
        check_positive("x", value)


def test_floating_and_of_one_shape():
    check_floating(a=torch.zeros(2), b=torch.ones(2))
    with pytest.raises(ValueError, match=re.escape("b must be [2] like a, got [1]")):
        check_floating(a=torch.zeros(2), b=torch.ones(1))
    with pytest.raises(ValueError, match=re.escape("a must be floating point, got torch.bool")):
        check_floating(a=torch.zeros(2).bool(), b=torch.ones(2))


def test_no_loss_computes_probabilities_itself():
    """Log-probabilities come from the fused kernels; a second softmax would be a second definition."""
    folder = pathlib.Path(halos_pl.losses.__file__).parent
    assert not [path.name for path in folder.glob("*.py") if "softmax" in path.read_text(encoding="utf-8")]
