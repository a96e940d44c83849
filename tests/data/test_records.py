import warnings

import pytest

from halos_pl.data.records import (
    BadRows,
    DataError,
    DataWarning,
    Origin,
    Paired,
    Unpaired,
    parse_prompt,
    parse_record,
)

HERE = Origin("rows.jsonl", 7)
USER, OTHER_USER = {"role": "user", "content": "Why?"}, {"role": "user", "content": "How?"}
GOOD, BAD = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "No."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
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


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "Yes", " 1 "])
def test_labels_that_mean_true(label):
    assert parse_record({"prompt": "a", "completion": "b", "label": label}, HERE).desirable is True


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
        (replaced(label="good"), "label", "got 'good' (str); expected true or false"),
        (replaced(label=2), "label", "got 2 (int)"),
        (replaced(label=0.7), "label", "got 0.7 (float)"),
        (replaced(label=None), "label", "got None (NoneType)"),
        (replaced(score="0.5"), "score", "got '0.5' (str); expected a number within ±1,000,000"),
        (replaced(score=True), "score", "got True (bool)"),
        (replaced(score=float("nan")), "score", "got nan (float)"),
        (replaced(score=float("-inf")), "score", "got -inf (float)"),
        (replaced(score=10**400), "score", "(int); expected a number within ±1,000,000"),
        (replaced(score=1e39), "score", "got 1e+39 (float); expected a number within ±1,000,000"),
        (replaced(prompt=3), "prompt", "got 3 (int); expected a string or a list of messages"),
        (replaced(completion=None), "completion", "missing"),
        (replaced(completion=""), "completion", "an empty completion"),
        (replaced(completion=" \n\t"), "completion", "an empty completion"),
        (replaced(prompt="a\0b"), "prompt", "a null byte at character 1"),
        (replaced(completion="b\ud800"), "completion", "half a surrogate pair at character 1"),
        (replaced(prompt=[USER]), "completion", "a str beside a list as the prompt; expected both plain"),
        (replaced(completion=[GOOD]), "completion", "a list beside a str as the prompt"),
        (replaced(tools=[TOOL]), "tools", "given beside a plain prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected", "an empty completion"),
        ({"chosen": "Human: a", "rejected": "Human: b"}, "prompt", "missing beside plain chosen and rejected"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen", "the same messages as rejected"),
        ({"chosen": [USER, GOOD], "rejected": [OTHER_USER, GOOD]}, "prompt", "begin differently"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "rejected", "no message; expected an assistant's turn"),
        ({"prompt": [USER], "completion": [USER, GOOD]}, "completion", "begins with a turn of 'user'"),
        ({"prompt": [USER], "completion": []}, "completion", "no message"),
        (
            {"prompt": [USER], "completion": [{"role": "assistant", "content": " "}]},
            "completion",
            "an empty completion",
        ),
        ({"prompt": [], "completion": [GOOD]}, "prompt", "no turn to reply to"),
        ({"prompt": [USER, BAD], "completion": [GOOD]}, "prompt", "no turn to reply to"),
        ({"messages": [USER]}, "messages", "no turn to reply to"),
        ({"messages": []}, "messages", "no turn to reply to"),
        ({"messages": [USER, OTHER_USER]}, "messages", "expected an assistant's turn"),
        ({"messages": "a"}, "messages", "got 'a' (str); expected a list of messages"),
        ({"messages": ["a"]}, "messages[0]", "got 'a' (str); expected a message"),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            "messages[0].role",
            "missing, the message's keys are: from, value",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "missing"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "messages[1].content",
            "null; expected a string",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content", "got ['a'] (list)"),
        ({"messages": [{"role": 1, "content": "a"}]}, "messages[0].role", "got 1 (int)"),
        (
            {"messages": [{"role": "User", "content": "a"}]},
            "messages[0].role",
            "'User' (did you mean 'user'?); expected one",
        ),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "messages[0].role", "(did you mean 'assistant'?)"),
        ({"messages": [USER, GOOD | {"tool_calls": ["\0"]}]}, "messages", "a null byte"),
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
    assert len(message) < 300


def test_huge_fields_warn_in_one_line():
    with pytest.warns(DataWarning, match=r"^rows.jsonl:7: prompt: 1,000,001 characters"):
        parse_record({"prompt": "x" * 1_000_001, "completion": "b"}, HERE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_record({"prompt": "x" * 1_000_000, "completion": "b"}, HERE)


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


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "a", "completion": 3}, "a"),
        ({"prompt": [USER], "value": "rain"}, [USER]),
        ({"messages": [USER, GOOD]}, [USER]),
        ({"messages": [USER, GOOD], "prompt": None}, [USER]),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt": None}, [USER]),
        ({"messages": [USER, GOOD, OTHER_USER]}, [USER, GOOD, OTHER_USER]),
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
        ({"messages": "hi"}, "messages: got 'hi' (str)"),
        ({"prompt": 3}, "prompt: got 3 (int)"),
    ],
)
def test_a_row_without_a_prompt_is_refused(row, says):
    with pytest.raises(DataError) as error:
        parse_prompt(row, HERE)
    assert str(error.value).startswith("rows.jsonl:7: ")
    assert says in str(error.value)
