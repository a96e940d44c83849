"""The exported folder: whole or absent, and bitwise the policy that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halos_pl.data.sources import Source
from halos_pl.losses import KTO
from halos_pl.model_card import model_card
from halos_pl.models import ModelSource, export_policy, load_model
from halos_pl.module import AlignmentModule

IDS = torch.arange(3, 90).reshape(3, 29)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def lm(tiny_model: Path) -> PreTrainedModel:
    return load_model(ModelSource(str(tiny_model))).eval()


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    """As the data leave it: with a chat template and an EOS of the user's choice."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "!"
    return tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {str(x.relative_to(folder)): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def test_round_trip_is_bitwise(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "policy"
    export_policy(lm, tokenizer, folder, "card\n")
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(again(IDS).logits, lm(IDS).logits)
    back = AutoTokenizer.from_pretrained(folder)
    assert back.eos_token == "!"
    assert back.get_vocab() == tokenizer.get_vocab()
    messages = [{"role": "user", "content": "hi"}]
    assert back.apply_chat_template(messages, tokenize=False) == "<user>hi"
    assert (folder / "README.md").read_text() == "card\n"
    assert [x.name for x in folder.parent.iterdir()] == ["policy"]
    assert not list(folder.glob("*.bin")), "no pickles"


@pytest.mark.parametrize(("known", "expected"), [(2, ["!", 2]), ([2, 3], ["!", 2, 3]), (None, ["!"]), ("!", "!")])
def test_generation_stops_at_the_tokenizers_eos(
    known: Any, expected: Any, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    eos = tokenizer.eos_token_id
    assert lm.generation_config is not None
    lm.generation_config.eos_token_id = eos if known == "!" else known
    export_policy(lm, tokenizer, tmp_path / "policy", "")
    written = json.loads((tmp_path / "policy" / "generation_config.json").read_text())
    assert written["eos_token_id"] == (eos if expected == "!" else [eos if x == "!" else x for x in expected])
    assert written["pad_token_id"] == tokenizer.pad_token_id


def test_a_newer_export_replaces_an_older_one(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "policy"
    export_policy(lm, tokenizer, folder, "old")
    (folder / "stale").touch()
    with torch.no_grad():
        lm.transformer.wte.weight.mul_(2)
    export_policy(lm, tokenizer, folder, "new")
    assert not (folder / "stale").exists()
    assert (folder / "README.md").read_text() == "new"
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits, lm(IDS).logits)
    assert [x.name for x in tmp_path.iterdir()] == ["policy"]


@pytest.mark.parametrize("older", [True, False])
def test_a_failure_in_the_middle_leaves_things_as_they_were(
    older: bool,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "policy"
    if older:
        export_policy(lm, tokenizer, folder, "old")
    before = contents(tmp_path)

    def full(*args: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export_policy(lm, tokenizer, folder, "new")
    assert contents(tmp_path) == before
    assert [x.name for x in tmp_path.iterdir()] == (["policy"] if older else [])


def test_leavings_of_a_killed_export_do_not_enter_the_next(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    aside = tmp_path / "policy.partial"
    aside.mkdir()
    (aside / "model-00007.safetensors").touch()
    export_policy(lm, tokenizer, tmp_path / "policy", "")
    assert not aside.exists()
    assert not (tmp_path / "policy" / "model-00007.safetensors").exists()


def test_the_card_has_valid_metadata_and_the_figures(tiny_model: Path) -> None:
    data: Any = SimpleNamespace(
        datasets={"train": SimpleNamespace(report="96 rows: all of them")}, sources={"train": [Source("a: file.jsonl")]}
    )
    for policy, base in ((str(tiny_model), None), ("some-org/some-model", "some-org/some-model")):
        module = AlignmentModule(KTO(beta=0.3), policy=str(tiny_model))
        object.__setattr__(module.source, "name", policy)
        card = model_card(module, data, {"val/loss": 0.5}, {"val/loss": 0.25, "val/kl": 1.0}, steps=7)
        _, header, body = card.split("---\n", 2)
        metadata = yaml.safe_load(header)
        assert metadata["library_name"] == "transformers"
        assert metadata["pipeline_tag"] == "text-generation"
        assert metadata["tags"] == ["halos-pl", "kto"]
        assert metadata.get("base_model") == base, "a folder is not a model of the hub"
        assert body.startswith("\n# KTO-aligned gpt2 model\n")
        assert "| val/loss | 0.5 | 0.25 |\n| val/kl | | 1 |\n" in body
        assert all(x in body for x in ("7 optimizer steps", "beta=0.3", "a: file.jsonl", "96 rows: all of them"))
