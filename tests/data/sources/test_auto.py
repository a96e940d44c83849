"""Which rows are recognised without a reader's name."""

import json
from contextlib import suppress

import pytest

from halos_pl.data.records import DataError
from halos_pl.data.sources import Source, as_sources, load_records, read_rows

HH = {key: f"\n\nHuman: q\n\nAssistant: {key}" for key in ("chosen", "rejected")}
SHARE = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": True}
ALPACA = {"instruction": "q", "input": "", "output": "a", "kto_tag": False}


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "c", "label": True},
        {"prompt": "p", "chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"},
        {"chosen": "\n\nHuman: a", "rejected": "b", "prompt": "p"},
        {"messages": [{"role": "user", "content": "q"}], "conversations": [1]},
        {"prompt": "p", "completion": "c", "kto_tag": True},
        {"prompt": "p", "question": "q", "answer": "a"},
        {"text": "x", "question": "q", "answer": "a"},
        {"prompt": "p", "completion": "c", "message_id": 1, "role": "x", "text": "y"},
        {"prompt": "p", "completion": "c", "event": "x", "id": 1},
        {"whatever": 1},
    ],
)
def test_our_schemas_pass_unparsed(tmp_path, row):
    path = written(tmp_path / "a.jsonl", row)
    assert [x for _, x in read_rows(path, lazy=True)] == [json.dumps(row).encode() + b"\n"]


def test_transcripts_and_llama_factory_are_recognised_file_by_file(tmp_path):
    written(tmp_path / "a.jsonl", HH, HH)
    written(tmp_path / "b.jsonl", SHARE)
    written(tmp_path / "c.jsonl", ALPACA)
    written(
        tmp_path / "d.jsonl",
        {
            "conversations": SHARE["conversations"][:1],
            "chosen": SHARE["conversations"][1],
            "rejected": SHARE["conversations"][1],
        },
    )
    written(tmp_path / "e.jsonl", {"prompt": "p", "completion": "c"})
    for lazy in (False, True):
        rows = [row for _, row in read_rows(str(tmp_path), lazy=lazy)]
        assert [list(row) for row in rows[:-1]] == [
            ["prompt", "chosen", "rejected"],
            ["prompt", "chosen", "rejected"],
            ["messages", "label"],
            ["messages", "label"],
            ["prompt", "chosen", "rejected"],
        ]
        assert isinstance(rows[-1], bytes) == lazy


def test_the_first_row_that_can_be_parsed_decides(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" + json.dumps(HH) + "\n" + json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    for lazy in (False, True):
        bad, good, other = (row for _, row in read_rows(str(path), lazy=lazy))
        assert isinstance(bad, DataError)
        assert good["prompt"] == [{"role": "user", "content": "q"}]
        assert "chosen: missing" in str(other)


@pytest.mark.parametrize(
    ("row", "reader"),
    [
        ({"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 2, "score_B": 1}, "shp"),
        ({"message_id": "x", "parent_id": None, "text": "t", "role": "prompter", "lang": "en"}, "oasst"),
        ({"question": "q", "answer": "#### 1"}, "gsm8k"),
        ({"instruction": "q", "input": "", "output": "a"}, "llama-factory"),
        ({"event": "feedback", "id": "x", "prompt": "p", "completion": "c", "label": True}, "events"),
        ({"event": "retraction", "id": "x"}, "events"),
    ],
)
def test_rows_of_a_named_reader_say_its_name(tmp_path, row, reader):
    path = written(tmp_path / "a.jsonl", row)
    with pytest.raises(DataError) as error:
        load_records(path)
    assert str(error.value).startswith(
        f"{path}: its rows are of a kind that the reader '{reader}' reads (their keys are: "
    )
    assert str(error.value).endswith(f"expected it to be named, as in {{path: {path}, reader: {reader}}}")
    with suppress(DataError):  # one message of a tree, or one retraction, is nothing to learn from
        list(read_rows(Source(path, reader=reader)))


def test_columns_make_a_rows_kind_ours(tmp_path):
    path = written(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    (record,) = load_records(Source(path, columns={"prompt": "question", "completion": "answer"})).records
    assert (record.prompt, record.completion) == ("q", "a")


def test_logs_have_torn_ends(tmp_path):
    path = tmp_path / "log.jsonl"
    event = {"event": "feedback", "id": "x", "prompt": "p", "completion": "c", "label": True}
    path.write_text(json.dumps(event) + '\n{"event": "feed')
    assert [row["completion"] for _, row in read_rows(Source(str(path), reader="events"))] == ["c"]
    path.write_text(json.dumps(event))
    assert len(list(read_rows(Source(str(path), reader="events")))) == 1
    path.write_text('{"event": "feed\n' + json.dumps(event))
    assert [type(row) for _, row in read_rows(Source(str(path), reader="events"))] == [DataError, dict]
    assert as_sources(str(path)) == [Source(str(path))]
