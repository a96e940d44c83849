"""UltraFeedback, UltraChat and TRL's mix: rows of the true schemas."""

import json

import pytest

from halos_pl.data.records import DataError, DataWarning, Origin, Paired, parse_record
from halos_pl.data.sources import Source, read_rows
from halos_pl.data.sources.readers import kto_mix, ultrachat, ultrafeedback


def turn(role, content):
    return {"role": role, "content": content}


def one(module, row):
    ((_, found),) = module.read(iter([(Origin("a", 1), row)]))
    return found


FEEDBACK = {
    "prompt": "hi",
    "prompt_id": "x",
    "chosen": [turn("user", "hi"), turn("assistant", "good  day")],
    "rejected": [turn("user", "hi"), turn("assistant", "no")],
    "messages": [turn("user", "hi"), turn("assistant", "good  day")],
    "score_chosen": 9.0,
    "score_rejected": 3.0,
}


def test_ultrafeedback():
    row = one(ultrafeedback, FEEDBACK)
    assert row == {
        "prompt": [turn("user", "hi")],
        "chosen": [turn("assistant", "good  day")],
        "rejected": [turn("assistant", "no")],
    }
    assert isinstance(parse_record(row, Origin("a", 1)), Paired)
    for change, says in (
        ({"rejected": [turn("user", "ho"), turn("assistant", "no")]}, "rejected: another history than chosen's"),
        ({"chosen": "x"}, "chosen: got 'x'"),
        ({"chosen": [turn("assistant", "x")]}, "chosen: got [{"),
        ({"chosen": None}, "chosen: missing"),
    ):
        assert str(one(ultrafeedback, {**FEEDBACK, **change})).startswith(f"a:1: {says}")


def test_ultrachat():
    messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    row = one(ultrachat, {"prompt": "a", "prompt_id": "x", "messages": messages})
    assert row == {"messages": messages}
    assert parse_record(row, Origin("a", 1)).completion == messages[-1:]
    assert isinstance(one(ultrachat, {"prompt": "a"}), DataError)


def test_kto_mix():
    row = {"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")], "label": False}
    assert one(kto_mix, {**row, "source": "x"}) == row
    assert "label: missing" in str(one(kto_mix, {**row, "label": None}))


@pytest.mark.parametrize(
    ("split", "said"), [("train", "prefs"), ("test", "test prefs"), ("train_sft", "sft"), (None, None)]
)
def test_splits_of_a_local_copy_are_the_hubs(tmp_path, split, said):
    """The hub's files carry the hub's names of splits."""
    for name, content in (("train_prefs", "prefs"), ("train_sft", "sft"), ("test_prefs", "test prefs")):
        pair = {key: [turn("user", "q"), turn("assistant", f"{content} {key}")] for key in ("chosen", "rejected")}
        (tmp_path / f"{name}-00000-of-00001.jsonl").write_text(json.dumps(pair) + "\n")
    if said is None:
        with pytest.warns(DataWarning, match="rows of all splits"):
            assert len(list(read_rows(Source(str(tmp_path), reader="ultrafeedback")))) == 3
        return
    ((_, row),) = read_rows(Source(str(tmp_path), reader="ultrafeedback", split=split))
    assert row["chosen"][0]["content"] == f"{said} chosen"
    plain = tmp_path / "plain"
    plain.mkdir()
    (tmp_path / "train_prefs-00000-of-00001.jsonl").rename(plain / "train.jsonl")
    assert len(list(read_rows(Source(str(plain), reader="ultrafeedback", split="train")))) == 1
