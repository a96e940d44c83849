"""What an objective asks of models and data, in every case, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halos_pl.losses import (
    CDPO,
    CSFT,
    DPO,
    IPO,
    KTO,
    OBJECTIVES,
    ORPO,
    SFT,
    KTOv1,
    Objective,
    PPOOffline,
    SimPO,
    SLiC,
)
from halos_pl.models import ModelSource
from halos_pl.needs import data_needs, reference_source

ALL = [cls() for cls in OBJECTIVES]
COMPARING = [x for x in ALL if x.needs_reference]
ALONE = [x for x in ALL if not x.needs_reference]
POLICY = ModelSource("policy", dtype="float64", dropout=True, attn_implementation="eager", trust_remote_code=True)


PAIRED = (DPO, CDPO, IPO, SimPO, SLiC, ORPO)


def kind(objective: Objective) -> str:
    return type(objective).__name__


def test_which_objectives_compare_with_a_reference() -> None:
    assert {type(x) for x in ALONE} == {SFT, CSFT, SimPO, SLiC, ORPO}


@pytest.mark.parametrize("objective", COMPARING, ids=kind)
def test_a_copy_is_loaded_as_the_policy_is(objective: Objective) -> None:
    assert reference_source(objective, POLICY, "copy") is POLICY


@pytest.mark.parametrize("objective", COMPARING, ids=kind)
def test_a_named_reference_is_loaded_with_the_policys_options(objective: Objective) -> None:
    assert reference_source(objective, POLICY, "other") == replace(POLICY, name="other")
    random = ModelSource(config={"model_type": "llama"}, dtype="bfloat16", seed=3)
    assert reference_source(objective, random, "other") == ModelSource("other", dtype="bfloat16", seed=3)


@pytest.mark.parametrize("reference", ["copy", "none"])
@pytest.mark.parametrize("objective", ALONE, ids=kind)
def test_no_reference_for_what_compares_with_none(objective: Objective, reference: str) -> None:
    assert reference_source(objective, POLICY, reference) is None


@pytest.mark.parametrize("objective", ALONE, ids=kind)
def test_a_reference_without_a_use_is_refused(objective: Objective) -> None:
    says = f"{kind(objective)} compares with no reference: leave --model.reference folder/model out"
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        reference_source(objective, POLICY, "folder/model")


@pytest.mark.parametrize("objective", [x for x in COMPARING if type(x) is not KTO], ids=kind)
def test_what_has_no_form_without_a_reference_says_so(objective: Objective) -> None:
    says = (
        f"{kind(objective)} compares policy and reference and has no reference-free form: set --model.reference copy, "
        "or a folder or hub name"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        reference_source(objective, POLICY, "none")


def test_kto_goes_without_a_reference() -> None:
    assert reference_source(KTO(), POLICY, "none") is None


def test_but_not_without_its_reference_point_too() -> None:
    """Mean log-probabilities are all below 0: every completion would be a loss."""
    with pytest.raises(ValueError, match=r"^KTO without a reference compares .* leave --model\.objective\."):
        reference_source(KTO(reference_point=False), POLICY, "none")


def test_nor_under_the_humanline() -> None:
    objective = KTO(humanline=(-1.0, 1.5))
    assert reference_source(objective, POLICY, "copy") is POLICY
    with pytest.raises(ValueError, match=r"^humanline clamps log-ratios to a reference: leave it or --model"):
        reference_source(objective, POLICY, "none")


# -------------------------------------------------------------------------------------------------- data


def source(folder: Path, name: str, **config: Any) -> ModelSource:
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return ModelSource(str(folder / name))


@pytest.fixture
def long(tmp_path: Path) -> ModelSource:
    return source(tmp_path, "long", vocab_size=120, max_position_embeddings=96)


@pytest.fixture
def short(tmp_path: Path) -> ModelSource:
    return source(tmp_path, "short", vocab_size=100, max_position_embeddings=48)


def needs(objective: Objective, *models: ModelSource, trust: bool = False) -> Any:
    return data_needs(objective, models, "a tokenizer", trust_remote_code=trust)


@pytest.mark.parametrize("objective", ALL, ids=kind)
def test_what_the_objective_declares_is_handed_on(objective: Objective, long: ModelSource) -> None:
    found = needs(objective, long)
    assert (found.view, found.equal_halves, found.control) == (
        "sft" if type(objective) is SFT else "paired" if type(objective) in PAIRED else "unpaired",
        isinstance(objective, KTOv1),
        ("<|good|>", "<|bad|>") if isinstance(objective, CSFT) else None,
    )
    assert found.mismatched == (type(objective) is KTO), "y′ costs two passes: BCO and the others have no use for it"
    assert not found.scores
    assert found.tokenizer == "a tokenizer"


def test_options_of_an_objective_change_what_it_needs(long: ModelSource) -> None:
    assert not needs(KTO(reference_point=False), long).mismatched
    assert needs(PPOOffline(reward="score"), long).scores
    assert needs(CSFT(good="+", bad="-"), long).control == ("+", "-")


def test_the_smaller_head_and_the_shorter_model_count(long: ModelSource, short: ModelSource) -> None:
    for models in ((long, short), (short, long)):
        found = needs(DPO(), *models)
        assert (found.vocab_size, found.max_positions) == (100, 48)
    alone = needs(DPO(), long)
    assert (alone.vocab_size, alone.max_positions) == (120, 96)


def test_a_model_without_a_limit_sets_none(long: ModelSource, tmp_path: Path) -> None:
    endless = source(tmp_path, "endless", model_type="bloom", vocab_size=130)
    assert endless.max_positions is None
    assert needs(DPO(), endless).max_positions is None
    assert needs(DPO(), endless, long).max_positions == needs(DPO(), long, endless).max_positions == 96


def test_only_another_reference_is_named(long: ModelSource, short: ModelSource) -> None:
    """Its tokenizer is compared with the policy's."""
    assert needs(DPO(), long).reference is None
    assert needs(DPO(), long, long).reference is None
    assert needs(DPO(), long, short).reference == short.name


def test_code_is_trusted_only_where_it_is_said(long: ModelSource) -> None:
    assert [needs(DPO(), long, trust=trust).trust_remote_code for trust in (True, False)] == [True, False]
