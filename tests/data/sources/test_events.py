import json

import pytest

from halos_pl.data.records import DataError, Origin, parse_record
from halos_pl.data.sources import Source, events, read_rows
from halos_pl.feedback_log import append, retract


def event(name, label=True, **more):
    return {"event": "feedback", "id": name, "prompt": "p", "completion": f"c{name}", "label": label, **more}


def taken_back(name):
    return {"event": "retraction", "id": name}


def read(*rows):
    return [(x.row, row) for x, row in events.read((Origin("log", i), row) for i, row in enumerate(rows, 1))]


def kept(*rows):
    """Line, id and label of what is left."""
    return [(line, row["completion"][1:], row["label"]) for line, row in read(*rows)]


def test_events_become_rows_of_the_records_schema():
    tools = [{"name": "add"}]
    extra = {"v": 1, "time": "2026-01-01T00:00:00Z", "meta": {"user": 7}, "score": 2, "tools": tools, "other": 1}
    row = {"prompt": "p", "completion": "ca", "label": True}
    assert read(event("a"), event("b", **extra)) == [
        (1, row),
        (2, {**row, "completion": "cb", "score": 2, "tools": tools}),
    ]
    assert read(event("a", label=None, score=0)) == [(1, {"prompt": "p", "completion": "ca", "score": 0})]


def test_the_last_event_of_an_id_wins_at_the_place_of_the_first():
    assert kept(event("a"), event("b"), event("a", False)) == [(3, "a", False), (2, "b", True)]


def test_retracted_events_are_left_out():
    assert kept(event("a"), event("b"), taken_back("a")) == [(2, "b", True)]
    assert kept(event("a"), event("b"), taken_back("a"), event("a", False)) == [(4, "a", False), (2, "b", True)]
    assert kept(event("a"), taken_back("a"), taken_back("a")) == []


def test_a_retraction_of_what_is_not_there_is_fine():
    assert kept(taken_back("a"), event("b"), event("a")) == [(2, "b", True), (3, "a", True)]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (3, "event: got 3 (int); expected an object with event and id"),
        ({"prompt": "p", "completion": "c", "label": True}, "event: missing, the row's keys are: prompt, "),
        ({"evnt": "feedback", "id": "a"}, "event: missing (did you mean 'evnt'?)"),
        (
            {"event": "feedbak", "id": "a"},
            "event: got 'feedbak' (str) (did you mean 'feedback'?); expected feedback or retraction",
        ),
        (
            {"event": ["feedback"], "id": "a"},
            "event: got ['feedback'] (list); expected feedback or retraction",
        ),
        ({"event": "retraction"}, "id: got None (NoneType); expected a string that names the completion"),
        ({"event": "feedback", "id": 7, "label": True}, "id: got 7 (int); expected a string"),
        ({"event": "feedback", "id": "", "label": True}, "id: got '' (str); expected a string"),
        ({"v": 2, "event": "feedback", "id": "a"}, "v: got 2 (int); expected 1"),
        ({"event": "feedback", "id": "a", "prompt": "p"}, "label: neither label nor score; expected at least one"),
        ({"event": "feedback", "id": "a", "label": None, "score": None}, "label: neither label nor score"),
        (
            {"event": "feedback", "id": "a", "lable": True, "score": 1},
            "label: missing, the event's keys are: event, id, lable, ",
        ),
    ],
)
def test_bad_events_are_bad_rows(row, says):
    good, bad = read(event("b"), row)[:: 1 if "label: " in says else -1]
    assert good == (1, {"prompt": "p", "completion": "cb", "label": True})
    assert bad[0] == 2
    assert isinstance(bad[1], DataError)
    assert str(bad[1]).startswith(f"log:2: {says}")


def test_unreadable_lines_pass_through():
    error = DataError("log:1: column 1")
    assert read(error, event("a"))[0] == (1, error)


def test_a_bad_event_does_not_leave_an_earlier_one_in_force():
    """Whoever changed their mind is not trained on with the old one, and a later event or retraction mends it."""
    bad = {"event": "feedback", "id": "a", "prompt": "p", "completion": "c"}
    ((line, row),) = read(event("a"), bad)
    assert line == 2
    assert isinstance(row, DataError)
    assert kept(event("a"), bad, event("a", False)) == [(3, "a", False)]
    assert read(event("a"), bad, taken_back("a")) == []


def test_rows_are_read_once_and_in_turn():
    def rows():
        yield Origin("log", 1), DataError("first")
        pulled.append(True)

    pulled = []
    stream = events.read(rows())
    assert not pulled
    next(stream)
    assert not pulled
    assert list(stream) == []


def test_what_a_service_logs_is_what_training_reads(tmp_path):
    log = tmp_path / "feedback.jsonl"
    chat = {"prompt": [{"role": "user", "content": "hi\u2028"}], "completion": [{"role": "assistant", "content": "🙂"}]}
    first = append(log, prompt="p", completion="c", label=True)
    second = append(log, **chat, score=0.5, meta={"page": 3})
    append(log, prompt="p", completion="c", label=False, id=first)
    retract(log, append(log, prompt="p", completion="never", label=True))
    records = [parse_record(row, origin) for origin, row in read_rows(Source(str(log), reader="events"))]
    assert [(x.prompt, x.completion, x.desirable, x.score, x.origin.row) for x in records] == [
        ("p", "c", False, None, 3),
        (chat["prompt"], chat["completion"], None, 0.5, 2),
    ]
    assert second in {json.loads(x)["id"] for x in log.read_text().splitlines()}


def test_a_torn_last_line_is_left_out(tmp_path):
    log = tmp_path / "feedback.jsonl"
    append(log, prompt="p", completion="c", label=True, id="a")
    with log.open("ab") as file:
        file.write(b'{"v": 1, "event": "feed')
    assert [(origin.row, row["label"]) for origin, row in read_rows(Source(str(log), reader="events"))] == [(1, True)]
