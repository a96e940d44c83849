import math
import pickle
import random
from contextlib import suppress

import pytest

from halos_pl.data.records import BadRows, DataError, Origin, Paired, Unpaired, parse_prompt, parse_record

HERE = Origin("rows.jsonl", 7)
SYSTEM = {"role": "system", "content": "Short."}
USER, OTHER_USER = {"role": "user", "content": "Why?"}, {"role": "user", "content": "How?"}
GOOD, BAD = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "No."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, Unpaired("a", "b", True, HERE)),
        ({"prompt": "", "completion": " b", "label": 0, "uid": 3}, Unpaired("", " b", False, HERE)),
        ({"prompt": "a", "completion": "b"}, Unpaired("a", "b", None, HERE)),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, Paired("a", "b", "c", HERE)),
        ({"prompt": [USER], "completion": [GOOD], "label": "no"}, Unpaired([USER], [GOOD], False, HERE)),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, Paired([USER], [GOOD], [BAD], HERE)),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, Paired([USER], [GOOD], [BAD], HERE)),
        (
            {"chosen": [USER, BAD, OTHER_USER, GOOD], "rejected": [USER, BAD, OTHER_USER, BAD]},
            Paired([USER, BAD, OTHER_USER], [GOOD], [BAD], HERE),
        ),
        ({"messages": [USER, BAD, OTHER_USER, GOOD]}, Unpaired([USER, BAD, OTHER_USER], [GOOD], None, HERE)),
        ({"messages": [USER, GOOD], "label": 1.0}, Unpaired([USER], [GOOD], True, HERE)),
        ({"prompt": "unused", "messages": [USER, GOOD]}, Unpaired([USER], [GOOD], None, HERE)),
        ({"prompt": "Why?", "messages": [USER, GOOD], "prompt_id": "x"}, Unpaired([USER], [GOOD], None, HERE)),
        ({"text": " Once."}, Unpaired("", " Once.", None, HERE)),
        ({"text": "b", "label": "down", "score": 1}, Unpaired("", "b", False, HERE, score=1.0)),
        ({"text": "b", "prompt": None, "messages": None}, Unpaired("", "b", None, HERE)),
        ({"text": "unused", "prompt": "a", "completion": "b"}, Unpaired("a", "b", None, HERE)),
        ({"text": "unused", "messages": [USER, GOOD]}, Unpaired([USER], [GOOD], None, HERE)),
        ({"text": "unused", "prompt": "a", "chosen": "b", "rejected": "c"}, Paired("a", "b", "c", HERE)),
        ({"chosen": "Q: Why? A: So.", "rejected": "Q: Why? A: No."}, Paired("Q: Why? A:", " So.", " No.", HERE)),
        ({"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, Paired([USER], [GOOD], [BAD], HERE)),
        (
            {"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 9.0, "margin": "x"},
            Paired([USER], [GOOD], [BAD], HERE),
        ),
        (
            {"prompt": "Why?", "chosen": [USER, BAD, OTHER_USER, GOOD], "rejected": [USER, BAD, OTHER_USER, BAD]},
            Paired([USER, BAD, OTHER_USER], [GOOD], [BAD], HERE),
        ),
        ({"prompt": "a", "completion": "b", "completions": ["c"]}, Unpaired("a", "b", None, HERE)),
        ({"prompt": "a", "completion": "b", "_demonstration": "x"}, Unpaired("a", "b", None, HERE)),
        ({"messages": [USER, GOOD], "tools": [TOOL]}, Unpaired([USER], [GOOD], None, HERE, [TOOL])),
        ({"messages": [USER, GOOD], "tools": '[{"name": "f"}]'}, Unpaired([USER], [GOOD], None, HERE, [{"name": "f"}])),
        ({"prompt": "a", "completion": "b", "tools": None}, Unpaired("a", "b", None, HERE)),
        ({"prompt": "a", "completion": "b", "score": -2}, Unpaired("a", "b", None, HERE, score=-2.0)),
        ({"messages": [USER, GOOD], "label": 1, "score": 0.5}, Unpaired([USER], [GOOD], True, HERE, score=0.5)),
        ({"prompt": "a", "completion": "b", "score": None}, Unpaired("a", "b", None, HERE)),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score": "high"}, Paired("a", "b", "c", HERE)),
    ],
)
def test_schema_is_found_from_the_keys(row, record):
    assert parse_record(row, HERE) == record


def test_null_fields_of_messages_are_absent_and_tool_calls_may_stand_alone():
    parquet = {"messages": [USER | {"tool_calls": None}, CALL]}
    assert parse_record(parquet, HERE) == Unpaired([USER], [CALL | {"content": ""}], None, HERE)


@pytest.mark.parametrize("value", ["chosen", "rejected", None])
def test_a_reader_names_the_reply_of_a_pair_to_imitate(value):
    assert parse_record(PAIR | {"_demonstration": value}, HERE) == Paired("a", "b", "c", HERE, demonstration=value)
    assert parse_record(PAIR, HERE).demonstration == "chosen"


def replaced(**fields):
    return {"prompt": "a", "completion": "b", "label": True} | fields


@pytest.mark.parametrize(
    ("row", "key", "says"),
    [
        ([1], "the row is [1] (list)", "expected an object"),
        ({"promt": "a", "completion": "b"}, "prompt", "missing (did you mean 'promt'?), the row's keys are: promt,"),
        ({"prompt": "a", "completion": "b", "labels": True}, "label", "missing (did you mean 'labels'?)"),
        ({"prompt": "a", "chosen": "b"}, "rejected", "expected the keys prompt+completion[+label]"),
        ({}, "prompt", "the row's keys are: none"),
        ({"a\nb": 1}, "prompt", "the row's keys are: 'a\\nb'; expected"),
        ({"x" * 999: 1} | {f"k{i}": 1 for i in range(30)}, "prompt", "k17, k18 and 11 more; expected"),
        (replaced(label=None), "label", "got None (NoneType)"),
        (replaced(label="maybe"), "label", "got 'maybe' (str); expected true or false"),
        (replaced(score="0.5"), "score", "got '0.5' (str); expected a number within ±1,000,000"),
        ({"text": ["a"]}, "text", "got ['a'] (list); expected a string (a conversation goes into `messages`)"),
        ({"text": [USER, GOOD]}, "text", "(list); expected a string"),
        ({"text": " "}, "text", "an empty completion"),
        ({"text": "a\0"}, "text", "a null byte at character 1"),
        ({"text": "a", "prompt": "b"}, "completion", "missing"),
        ({"text": "a", "completion": "b"}, "prompt", "missing"),
        ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, "completions", "stepwise supervision"),
        ({"prompt": "a", "completions": ["b", "c"]}, "completion", "missing (did you mean 'completions'?)"),
        (PAIR | {"_demonstration": "both"}, "_demonstration", "got 'both' (str); expected 'chosen', 'rejected' or"),
        (PAIR | {"_demonstration": ["chosen"]}, "_demonstration", "got ['chosen'] (list)"),
        (PAIR | {"chosen": [GOOD], "rejected": [BAD]}, "chosen", "a list beside a str as the prompt; expected both"),
        (PAIR | {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "chosen", "a list beside a str as the prompt"),
        ({"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [OTHER_USER, BAD]}, "chosen", "a list beside a str"),
        ({"prompt": "Why?", "chosen": [OTHER_USER, GOOD], "rejected": [USER, BAD]}, "chosen", "a list beside a str"),
        ({"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen", "the same messages"),
        ({"prompt": "a", "completion": [USER, GOOD]}, "completion", "a list beside a str as the prompt"),
        (replaced(prompt=3), "prompt", "got 3 (int); expected a string or a list of messages"),
        (replaced(completion=None), "completion", "missing"),
        (replaced(completion=" \n\t"), "completion", "an empty completion"),
        (replaced(prompt="a\0b"), "prompt", "a null byte at character 1"),
        (replaced(completion="b\ud800"), "completion", "half a surrogate pair at character 1"),
        (replaced(prompt=[USER]), "completion", "a str beside a list as the prompt; expected both plain"),
        (replaced(tools=[TOOL]), "tools", "given beside a plain prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected", "an empty completion"),
        ({"chosen": "Human: a", "rejected": "Human: a"}, "chosen", "the same text as rejected; expected another reply"),
        ({"chosen": "Yes.", "rejected": "Yesterday."}, "prompt", "missing, and chosen and rejected do not begin with"),
        ({"chosen": "Yes.", "rejected": [GOOD]}, "rejected", "a list beside a str as chosen; expected both plain"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen", "the same messages as rejected"),
        ({"chosen": [USER, GOOD], "rejected": [OTHER_USER, GOOD]}, "prompt", "begin differently"),
        ({"messages": "a"}, "messages", "got 'a' (str); expected a list of messages"),
        ({"messages": [USER, GOOD], "tools": "{"}, "tools", "got '{' (str); expected a list of tool schemas"),
        ({"messages": [USER, GOOD], "tools": ["f"]}, "tools", "got ['f'] (list)"),
    ],
)
def test_errors_name_file_row_key_and_what_was_expected(row, key, says):
    with pytest.raises(DataError) as error:
        parse_record(row, HERE)
    message = str(error.value)
    assert message.startswith(f"rows.jsonl:7: {key}")
    assert says in message
    assert "; expected " in message
    assert "\n" not in message
    assert len(message) < 400
    assert error.value.origin == HERE


def collect(bad, count):
    for i in range(count):
        with bad.caught():
            raise DataError(f"e{i}")
    bad.finish()


def test_bad_rows_are_listed_ten_at_a_time_or_kept():
    with pytest.raises(DataError, match=r"^the first 10 bad rows:\n  e0\n(  e\d\n){9}correct them, .*on_bad_row skip$"):
        collect(BadRows(), 11)
    with pytest.raises(DataError, match=r"^bad rows:\n  e0\n  e1\ncorrect them"):
        collect(BadRows(), 2)
    lenient = BadRows("skip")
    collect(lenient, 11)
    assert lenient.messages == [f"e{i}" for i in range(11)]
    with pytest.raises(ValueError, match="on_bad_row is 'ignore'"):
        BadRows("ignore")


def test_what_is_the_same_but_for_the_row_is_told_once():
    rows = [{"promt": "a"}, {"prompt": "a"}, {"prompt": ""}, {"promt": "b"}, {"promt": "b"}]
    bad = BadRows()
    for number, row in enumerate(rows, 1):
        with bad.caught():
            parse_record(row, Origin("a.jsonl", number))
    with bad.caught():
        parse_record(rows[0], Origin("b.jsonl", 1))
    for _ in range(2):
        with bad.caught():
            raise DataError("of no row")
    with pytest.raises(DataError) as error:
        bad.finish()
    title, first, second, third, fourth, advice = str(error.value).splitlines()
    assert title == "bad rows:"
    assert first.startswith("  a.jsonl:1: prompt: missing (did you mean 'promt'?)")
    assert first.endswith(" or text (and 2 more like it: rows 4, 5)")
    assert second.startswith("  a.jsonl:2: completion: missing")
    assert second.endswith(" or text (and 1 more like it: row 3)")
    assert third.startswith("  b.jsonl:1: prompt: missing")
    assert third.endswith(" or text")
    assert fourth == "  of no row (and 1 more like it)"
    assert advice == "correct them, or go on without them: --data.on_bad_row skip"
    assert bad.origins == [*(Origin("a.jsonl", i) for i in range(1, 6)), Origin("b.jsonl", 1), None, None]
    assert len(bad.messages) == 8


def test_ten_of_a_kind_stop_the_reading():
    bad = BadRows()

    def read():
        for number in range(1, 12):
            with bad.caught():
                parse_record({}, Origin("a.jsonl", number))

    with pytest.raises(DataError, match=r"^the first 10 bad rows:\n.*\(and 9 more like it: rows 2, 3, .*, 9, 10\)\n"):
        read()
    assert len(bad.origins) == 10


def test_errors_travel_between_processes_with_their_row():
    error = pickle.loads(pickle.dumps(HERE.error("label", "missing", "one")))
    assert (str(error), error.origin) == ("rows.jsonl:7: label: missing; expected one", HERE)
    assert DataError("a").origin is None


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "a", "completion": 3}, "a"),
        ({"prompt": [USER], "value": "rain"}, [USER]),
        ({"messages": [USER, GOOD]}, [USER]),
        ({"messages": [USER, GOOD], "prompt": None}, [USER]),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt": None}, [USER]),
        ({"messages": [USER, GOOD, OTHER_USER]}, [USER, GOOD, OTHER_USER]),
        ({"prompt": "Why?", "messages": [USER, GOOD]}, [USER]),
        ({"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
        ({"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}, "a"),
        ({"prompt": [USER], "chosen": ["x"], "rejected": ["y"]}, [USER]),
        ({"prompt": [USER], "messages": [OTHER_USER], "completion": [GOOD]}, [USER]),
        ({"chosen": "Q: Why? So.", "rejected": "Q: Why? No."}, "Q: Why?"),
        ({"text": "Once."}, ""),
        ({"text": "unused", "prompt": "a"}, "a"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "a"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    ],
)
def test_the_prompt_of_any_row(row, prompt):
    assert parse_prompt(row, HERE) == (prompt, None)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("a", "the row is 'a' (str)"),
        ({"promt": "a"}, "prompt: missing (did you mean 'promt'?)"),
        ({"prompt": [USER, GOOD]}, "prompt: no turn to reply to"),
        ({"messages": [GOOD]}, "messages: no turn to reply to"),
        ({"messages": [OTHER_USER, USER]}, "messages[1].role: 'user' after 'user'"),
        ({"prompt": [SYSTEM]}, "prompt: no turn to reply to"),
        ({"text": 3}, "text: got 3 (int)"),
        ({"messages": "hi"}, "messages: got 'hi' (str)"),
        ({"prompt": 3}, "prompt: got 3 (int)"),
    ],
)
def test_a_row_without_a_prompt_is_refused(row, says):
    with pytest.raises(DataError) as error:
        parse_prompt(row, HERE)
    assert str(error.value).startswith("rows.jsonl:7: ")
    assert says in str(error.value)


KEYS = "prompt completion messages chosen rejected text label labels score tools completions _demonstration x".split()  # noqa: SIM905
WORDS = ["", " ", "a", "a b", "a c", "Why?", "yes", "labell", "chosen", "-1", "[{}]", "[" * 9999, "\0", "\ud800", "\n"]
GOOD_ROWS = [{}, PAIR, {"prompt": "a", "completion": "b"}, {"messages": [USER, GOOD]}, {"text": "a"}]
LEAVES = [None, True, False, 0, 1, -1, 2, 0.5, 10**400, math.nan, math.inf, *WORDS]


def random_value(rng, depth):
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice(LEAVES)
    if kind < 0.5:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind < 0.6:
        names = ["role", "content", "type", "text", "tool_calls", *WORDS]
        return {rng.choice(names): random_value(rng, depth - 1) for _ in range(rng.randrange(5))}
    if kind < 0.7:
        return [USER, rng.choice([GOOD, BAD, CALL])]
    return [random_turn(rng) for _ in range(rng.randrange(5))]


def random_turn(rng):
    content = rng.choice(["Why?", "", " ", "a", None, [{"type": "text", "text": "a"}], [{"type": "image"}], []])
    turn = {"role": rng.choice(["system", "user", "assistant", "tool", "users"]), "content": content}
    return turn | {"tool_calls": rng.choice([None, [], [{}]])} if rng.random() < 0.3 else turn


def test_any_json_value_is_a_record_or_a_data_error():
    rng, records = random.Random(0), 0
    for _ in range(20_000):
        row = rng.choice(GOOD_ROWS) | {rng.choice(KEYS): random_value(rng, 2) for _ in range(rng.randrange(4))}
        row = row if rng.random() < 0.98 else random_value(rng, 2)
        try:
            record = parse_record(row, HERE)
        except DataError as raised:
            error = raised
            with suppress(DataError):
                parse_prompt(row, HERE)
        else:
            records += 1
            assert parse_prompt(row, HERE) == (record.prompt, record.tools), row
            continue
        message = str(error)
        assert message.startswith("rows.jsonl:7: ")
        assert "; expected " in message
        assert message.isprintable()
        assert len(message) < 1000
        assert error.origin == HERE
    assert records > 1000
