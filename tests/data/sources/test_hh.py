"""Anthropic's transcripts."""

import json

import pytest

from halos_pl.data.records import DataError, Origin, parse_record
from halos_pl.data.sources import Source, read_rows
from halos_pl.data.sources.readers import hh

START = "\n\nHuman: How  are\t\tyou? \n\nAssistant: Fine,  thanks.\n\nand you?\n\nHuman:  Well.\nWhat now?"
PROMPT = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine, thanks.\n\nand you?"},
    {"role": "user", "content": "Well.\nWhat now?"},
]


def read(chosen, rejected):
    ((_, row),) = hh.read(iter([(Origin("a", 1), {"chosen": chosen, "rejected": rejected})]))
    return row


def test_a_pair_of_transcripts():
    row = read(START + "\n\nAssistant:  Human: no,  1 \t2. ", START + "\n\nAssistant: Nothing.")
    assert row == {
        "prompt": PROMPT,
        "chosen": [{"role": "assistant", "content": "Human: no, 1 2."}],
        "rejected": [{"role": "assistant", "content": "Nothing."}],
    }
    assert parse_record(row, Origin("a", 1)).demonstration == "chosen"


def test_indentation_of_one_tab_and_line_ends_stay():
    row = read("Human: a\n\nAssistant: x:\n\ty\n z", "Human: a\n\nAssistant: w")
    assert row["chosen"][0]["content"] == "x:\n\ty\n z"


@pytest.mark.parametrize(
    ("chosen", "rejected", "says"),
    [
        (
            START + "\n\nAssistant: a",
            START + "?\n\nAssistant: b",
            "rejected: another history than chosen's, from turn 3 on",
        ),
        (START + "\n\nAssistant: a", "\n\nHuman: How are you?\n\nAssistant: b", "rejected: another history"),
        (START, START + "\n\nAssistant: b", "chosen: no reply at the end"),
        (START + "\n\nAssistant: a", START + "\n\nAssistant:", "rejected: an empty reply at the end"),
        (START + "\n\nAssistant: a", START + "\n\nAssistant:   ", "rejected: an empty reply at the end"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "chosen: a reply to nothing"),
        ("hello", "hello", "chosen: 'hello' is in no turn"),
        ("x\n\nHuman: a\n\nAssistant: b", "", "chosen: 'x' is in no turn"),
        ("", "", "chosen: '' is in no turn"),
        (None, "", "chosen: missing"),
        (3, "", r"chosen: got 3 \(int\); expected a string"),
    ],
)
def test_what_is_no_comparison_of_two_replies(chosen, rejected, says):
    error = read(chosen, rejected)
    assert isinstance(error, DataError)
    assert str(error).startswith("a:1: " + says.replace("\\", ""))


def test_real_transcripts(shared_data):
    path = str(shared_data / "paired" / "hh_format_helpful.jsonl")
    chats = (shared_data / "sft" / "helpful_multi_turn.jsonl").read_text().splitlines()
    conversations = [json.loads(x)["messages"] for x in chats]
    for source in (Source(path, reader="hh"), Source(path)):
        rows = [row for _, row in read_rows(source)]
        assert len(rows) == 56
        assert all(len(row["prompt"]) % 2 == 1 and row["chosen"] != row["rejected"] for row in rows)
        multi_turn = [row["prompt"] + row["chosen"] for row in rows if len(row["prompt"]) > 1]
        squeezed = [[{**x, "content": hh.single_spaced(x["content"].strip())} for x in chat] for chat in conversations]
        assert all(chat in multi_turn for chat in squeezed)
