"""What ships: its bytes, that it was made as the script makes it, and where it is found."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos_pl.data.records import DataError
from halos_pl.data.sources import load_records, read_rows
from halos_pl.nano import __main__ as script
from halos_pl.nano.grammar import ANIMALS, NAMES, WORLD
from halos_pl.nano.shipped import PLACES, TEXTS, generated, locate, refuse_mixture
from halos_pl.nano.wishes import granted, prompts

BYTES = {
    "thumbs": "353be9a2a6bc51beca8d70f73e22c53d79cede62f4109c8b3550e70bebf1eea0",
    "thumbs-held-out": "172552afa3f61bee0167da3875f92462c9ba8d38485da936c4c4c14545048828",
    "pairs": "fab9dcf67ed7bb7f8ecd2ee77ebed213f7249c7ecc16d01a0ab65867e96cc49d",
    "pairs-held-out": "b087ac3dda0b2f7782a4498fcb09b27eebf1e8edd387b5bf094617555f69a156",
    "prompts": "81a40d5167ce2be52f317b5039e27694ad35c4b98411ffcdbef002b0f2b4c200",
}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(locate(f"nano:{name}")).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", BYTES)
def test_bytes(name: str) -> None:
    assert sha256(Path(locate(f"nano:{name}")).read_bytes()).hexdigest() == BYTES[name]


def test_all_files_are_pinned() -> None:
    assert set(BYTES) == set(PLACES) - {"model"}


def test_labels_are_the_verifiers() -> None:
    asked = prompts(seed=0, count=script.HELD_OUT + script.TRAINING)
    wishes = {row["prompt"][0]["content"]: row for row in asked}
    assert len(wishes) == len(asked)
    for name in ("thumbs", "thumbs-held-out"):
        for row in rows(name):
            assert granted(wishes[row["prompt"][0]["content"]], row["completion"][0]["content"]) is row["label"]
    for name in ("pairs", "pairs-held-out"):
        for row in rows(name):
            wish = wishes[row["prompt"][0]["content"]]
            assert granted(wish, row["chosen"][0]["content"])
            assert not granted(wish, row["rejected"][0]["content"])


def test_no_wish_is_both_trained_on_and_held_out() -> None:
    held_out = {json.dumps(row["prompt"]) for row in rows("prompts")}
    assert len(held_out) == 400
    assert {json.dumps(row["prompt"]) for row in rows("thumbs-held-out")} == held_out
    trained = {json.dumps(row["prompt"]) for name in ("thumbs", "pairs") for row in rows(name)}
    assert not trained & held_out
    wishes = {(x["name"], x["animal"], x["trait"], x["value"]) for x in rows("prompts")}
    asked = prompts(seed=0, count=script.HELD_OUT + script.TRAINING)[script.HELD_OUT :]
    assert not wishes & {(x["name"], x["animal"], x["trait"], x["value"]) for x in asked}


def test_the_script_makes_the_feedback_that_ships() -> None:
    """The first rows of each file, sampled anew; a sample depends on its own row alone."""
    made = script.feedback(locate("nano:model"), training=0, held_out=32, pairs=12)
    assert made["prompts"] == rows("prompts")[:32]
    assert made["thumbs-held-out"] == rows("thumbs-held-out")[:32]
    assert made["pairs-held-out"] == rows("pairs-held-out")[: len(made["pairs-held-out"])]
    assert len(made["pairs-held-out"]) > 8


def test_the_model_is_small_and_its_tokenizer_complete() -> None:
    folder = Path(locate("nano:model"))
    assert sum(x.stat().st_size for x in folder.iterdir()) < 3e6
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 3e5 < sum(p.numel() for p in model.parameters()) < 1e6
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for token in script.SPECIAL:
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(token, add_special_tokens=False)) == [token]
    words = [*NAMES, *ANIMALS, *(value for values in WORLD.values() for value in values)]
    assert all(len(tokenizer.encode(" " + word, add_special_tokens=False)) == 1 for word in words)
    for text in ("Größe 🦉 \t\n", "<b>"):  # any text can be said
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>Hi.<|assistant|>Yes.</s>"
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>Hi.<|assistant|>"


def test_the_tokenizer_is_the_scripts(tmp_path: Path) -> None:
    script.make_tokenizer(tmp_path)
    ours, made = (AutoTokenizer.from_pretrained(x) for x in (locate("nano:model"), tmp_path))
    assert ours.get_vocab() == made.get_vocab()
    assert ours.chat_template == made.chat_template


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_read_like_files(name: str) -> None:
    (origin, first), *_ = read_rows(f"nano:{name}")
    assert str(origin) == f"nano:{name}:1"
    assert first == next(iter(generated(f"nano:{name}") or ()))
    if "held-out" in name:
        assert len(load_records(f"nano:{name}").records) == 400


def test_names() -> None:
    assert locate("runs/x") == "runs/x"
    assert generated("runs/x") is None
    with pytest.raises(ValueError, match=r"nano:thumb: nothing of that name .* did you mean nano:thumbs"):
        locate("nano:thumb")
    with pytest.raises(ValueError, match=r"there are nano:model, nano:thumbs.*, nano:text-held-out"):
        locate("nano:")
    with pytest.raises(ValueError, match="nano:stories is a text"):
        locate("nano:stories")
    with pytest.raises(DataError, match=r"nano:stories: a generated text has no splits, and 'test'"):
        read_rows("nano:stories", "test")


def test_what_ships_does_not_mix_with_the_users_own() -> None:
    refuse_mixture({"data.train": "nano:thumbs", "data.validation": ["nano:pairs"], "evaluation.prompts": None})
    refuse_mixture({"data.train": ["mine.jsonl"], "data.validation": None})
    with pytest.raises(ValueError, match=r"or set --evaluation.prompts, --evaluation.verifier; null"):
        refuse_mixture({"data.train": ["mine.jsonl"], "evaluation.prompts": "nano:prompts"})
    with pytest.raises(ValueError, match=r"data.train is your own, but data.validation is the demo's .*recipes/kto"):
        refuse_mixture({"data.train": ["mine.jsonl"], "data.validation": "nano:pairs"})
