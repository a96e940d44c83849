import json
import warnings

import pytest

from halos_pl.data.messages import MAX_CHARACTERS, parse_text
from halos_pl.data.records import DataError, DataWarning, Origin, Paired, Unpaired, parse_prompt, parse_record

HERE = Origin("rows.jsonl", 7)


def turn(role, content="x"):
    return {"role": role, "content": content}


SYSTEM, DEVELOPER, USER, GOOD, TOOL = map(turn, ("system", "developer", "user", "assistant", "tool"))
BAD, OTHER_USER = turn("assistant", "No."), turn("user", "How?")
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
CALLED = CALL | {"content": ""}


def refusal(row, parse=parse_record):
    with pytest.raises(DataError) as error:
        parse(row, HERE)
    assert error.value.origin == HERE
    assert str(error.value).startswith("rows.jsonl:7: ")
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix("rows.jsonl:7: ")


# -------------------------------------------------------------------------------------------- the order of the turns


@pytest.mark.parametrize(
    "messages",
    [
        [USER, GOOD],
        [SYSTEM, USER, GOOD],
        [SYSTEM, DEVELOPER, SYSTEM, USER, GOOD],
        [USER, GOOD, USER, GOOD],
        [USER, CALLED, TOOL, GOOD],
        [USER, CALLED, TOOL, TOOL, CALLED, TOOL, GOOD, USER, GOOD],
        [USER, CALLED],
        [USER, CALLED, USER, GOOD],
    ],
)
def test_turns_in_order(messages):
    record = Unpaired(messages[:-1], messages[-1:], None, HERE)
    assert parse_record({"messages": messages}, HERE) == record
    assert parse_prompt({"messages": messages}, HERE) == (record.prompt, None)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([GOOD], "messages[0].role: 'assistant' at the beginning; expected 'system' or 'developer' or 'user'"),
        ([TOOL, GOOD], "messages[0].role: 'tool' at the beginning; expected 'system' or 'developer' or 'user'"),
        ([SYSTEM, GOOD], "messages[1].role: 'assistant' after 'system'; expected 'system' or 'developer' or 'user'"),
        ([DEVELOPER, TOOL, GOOD], "messages[1].role: 'tool' after 'developer'; expected 'system'"),
        ([USER, SYSTEM, GOOD], "messages[1].role: 'system' after 'user'; expected 'assistant'"),
        ([USER, GOOD, DEVELOPER, USER, GOOD], "messages[2].role: 'developer' after 'assistant'; expected 'user'"),
        ([SYSTEM, USER, GOOD, SYSTEM, USER, GOOD], "messages[3].role: 'system' after 'assistant'; expected 'user'"),
        ([USER, GOOD, USER, USER, GOOD], "messages[3].role: 'user' after 'user'; expected 'assistant'"),
        ([USER, TOOL, GOOD], "messages[1].role: 'tool' after 'user'; expected 'assistant'"),
        ([USER, GOOD, GOOD], "messages[2].role: 'assistant' after 'assistant'; expected 'user'"),
        ([USER, GOOD | {"tool_calls": []}, TOOL, GOOD], "messages[2].role: 'tool' after 'assistant'; expected 'user'"),
        ([USER, CALL, GOOD], "messages[2].role: 'assistant' after 'assistant'; expected 'tool' or 'user'"),
        ([USER | {"tool_calls": [{}]}, TOOL, GOOD], "messages[1].role: 'tool' after 'user'; expected 'assistant'"),
        ([USER, CALL, TOOL, USER, GOOD], "messages[3].role: 'user' after 'tool'; expected 'assistant' or 'tool'"),
        ([USER], "messages: ends with a turn of 'user'; expected an assistant's turn at the end"),
        ([USER, CALL, TOOL], "messages: ends with a turn of 'tool'; expected an assistant's turn at the end"),
        ([SYSTEM], "messages: ends with a turn of 'system'; expected an assistant's turn at the end"),
        ([], "messages: no message; expected an assistant's turn at the end"),
    ],
)
def test_turns_out_of_order(messages, says):
    assert says in refusal({"messages": messages})


@pytest.mark.parametrize("completion", [[GOOD], [CALLED, TOOL, GOOD], [GOOD, OTHER_USER, BAD]])
@pytest.mark.parametrize("prompt", [[USER], [SYSTEM, USER, GOOD, USER], [USER, CALLED, TOOL]])
def test_a_completion_may_have_several_turns(prompt, completion):
    row = {"prompt": prompt, "completion": completion, "label": True}
    assert parse_record(row, HERE) == Unpaired(prompt, completion, True, HERE)
    assert parse_record({"prompt": prompt, "chosen": completion, "rejected": [BAD]}, HERE).chosen == completion
    if completion != [GOOD]:
        shared = {"chosen": prompt + completion, "rejected": [*prompt, BAD]}
        assert parse_record(shared, HERE) == Paired(prompt, completion, [BAD], HERE)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": [USER, USER], "completion": [GOOD]}, "prompt[1].role: 'user' after 'user'; expected 'assistant'"),
        ({"prompt": [USER], "completion": [GOOD, GOOD]}, "completion[1].role: 'assistant' after 'assistant'; expected"),
        (
            {"prompt": [USER], "completion": [GOOD, USER]},
            "completion: ends with a turn of 'user'; expected an assistant's",
        ),
        (
            {"prompt": [USER], "completion": [CALL, TOOL]},
            "completion: ends with a turn of 'tool'; expected an assistant's",
        ),
        (
            {"prompt": [USER], "completion": [TOOL, GOOD]},
            "completion: begins with a turn of 'tool'; expected an assistant's",
        ),
        ({"prompt": [USER], "completion": [USER, GOOD]}, "completion: begins with a turn of 'user'"),
        ({"prompt": [USER], "completion": []}, "completion: no message; expected an assistant's turn"),
        ({"prompt": [USER], "completion": [turn("assistant", " ")]}, "completion: an empty completion"),
        ({"prompt": [USER], "completion": [CALL, TOOL, turn("assistant", "")]}, "completion: an empty completion"),
        ({"prompt": [USER], "completion": [turn("assistant", ""), USER, GOOD]}, "completion: an empty completion"),
        ({"prompt": [], "completion": [GOOD]}, "prompt: no turn to reply to; expected messages of which a user's"),
        ({"prompt": [USER, BAD], "completion": [GOOD]}, "prompt: no turn to reply to"),
        ({"prompt": [SYSTEM], "completion": [GOOD]}, "prompt: no turn to reply to"),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD, BAD]},
            "rejected[1].role: 'assistant' after 'assistant'",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "rejected: no message; expected an assistant's turn"),
        ({"chosen": [USER, USER, GOOD], "rejected": [USER, USER, BAD]}, "chosen[1].role: 'user' after 'user'"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD, BAD]}, "rejected[2].role: 'assistant' after 'assistant'"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "prompt: no turn to reply to"),
    ],
)
def test_the_order_is_checked_across_prompt_and_completion(row, says):
    assert says in refusal(row)


def test_a_prompt_to_sample_on_is_in_order_too():
    assert refusal({"prompt": [USER, OTHER_USER]}, parse_prompt).startswith("prompt[1].role: 'user' after 'user'")
    assert refusal({"messages": [USER, SYSTEM, GOOD]}, parse_prompt).startswith("messages[1].role: 'system' after")


# -------------------------------------------------------------------------------------------------- what a message is


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("a", "messages[1]: got 'a' (str); expected a message {role, content}"),
        ({"from": "gpt", "value": "a"}, "messages[1].role: missing, the message's keys are: from, value"),
        ({"role": "assistant"}, "messages[1].content: missing, the message's keys are: role"),
        ({"\n\ud800" + "x" * 99: 1}, f"messages[1].role: missing, the message's keys are: '\\n\\ud800{'x' * 31}…"),
        (turn("assistant", None), "messages[1].content: null; expected a string"),
        (turn("assistant", 3), "messages[1].content: got 3 (int); expected a string"),
        (turn(1), "messages[1].role: got 1 (int); expected a string"),
        (
            turn("User"),
            "messages[1].role: unknown role 'User' (did you mean 'user'?); expected one of system, developer",
        ),
        (turn("asistant"), "messages[1].role: unknown role 'asistant' (did you mean 'assistant'?)"),
        (turn("x" * 999), "messages[1].role: unknown role 'xxxxxxxxxxxx...xxxxxxxxxxxxx'; expected one of"),
        (GOOD | {"tool_calls": ["\0"]}, "messages: a null byte at character 0 of message 1; expected text"),
        (turn("assistant", "é\udfff"), "messages: half a surrogate pair at character 1 of message 1; expected text"),
        (turn("assistant", ["a"]), "messages[1].content: got ['a'] (list); expected a string, or a list of parts"),
        (turn("assistant", []), "messages[1].content: got [] (list); expected a string, or a list of parts"),
        (turn("assistant", [{"type": "text"}]), "messages[1].content[0].text: got None (NoneType); expected a string"),
        (
            turn("assistant", [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}]),
            "messages[1].content[1].type: got 'image_url' (str); expected 'text': images, sound and the like",
        ),
        (turn("assistant", [{"type": "text", "text": "a\0"}]), "messages: a null byte at character 1 of message 1"),
    ],
)
def test_errors_name_the_message(message, says):
    assert says in refusal({"messages": [USER, message]})


def test_text_parts_are_joined_and_nulls_of_parquet_are_absent():
    parts = [{"type": "text", "text": "a ", "image": None}, {"type": "text", "text": "b"}]
    record = parse_record({"messages": [turn("user", parts) | {"name": None}, GOOD]}, HERE)
    assert record.prompt == [turn("user", "a b")]
    called = turn("assistant", parts) | {"tool_calls": [{}]}
    assert parse_record({"messages": [USER, called]}, HERE).completion == [called | {"content": "a b"}]


@pytest.mark.parametrize("text", ["a\0", "é\0", "é\ud800", "\udc00"])
def test_what_no_tokenizer_takes(text):
    place = len(text) - 1
    assert (
        f"prompt: {'a null byte' if text[-1] == chr(0) else 'half a surrogate pair'} at character {place}; "
        in refusal({"prompt": text, "completion": "b"})
    )


def test_deep_nesting_is_no_matter():
    deep = []
    for _ in range(5000):
        deep = [deep]
    assert parse_text([GOOD | {"tool_calls": deep}], "completion", HERE)
    assert "tools: got '[[[" in refusal({"messages": [USER, GOOD], "tools": "[" * 100_000})


def test_huge_fields_warn_in_one_line():
    with pytest.warns(DataWarning, match=r"^rows.jsonl:7: prompt: 1,000,001 characters, most will be cut off$"):
        parse_record({"prompt": "x" * (MAX_CHARACTERS + 1), "completion": "b"}, HERE)
    with pytest.warns(DataWarning, match=r"^rows.jsonl:7: messages: 1,000,0\d\d characters"):
        parse_record({"messages": [turn("user", "x" * 500_000), turn("assistant", "x" * 500_000)]}, HERE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_record({"prompt": "x" * MAX_CHARACTERS, "completion": "b"}, HERE)


# ------------------------------------------------------------------------------------------------ a prompt not written


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: Why? A: So.", "Q: Why? A: No.", "Q: Why? A:"),  # the space goes with the reply
        ("Human: a", "Human: b", "Human:"),
        ("A:\nYes", "A:\nNo", "A:\n"),  # a line break stays
        ("A:  Yes", "A:  No", "A: "),  # one space goes, as in TRL
        ("I like tea.", "I like tears.", "I like"),  # inside a word
        ("say hello", "say help", "say"),
        ("I don't.", "I don", "I"),
        ("I don't.", "I don!", "I"),
        ("x = foo_bar", "x = foo_baz", "x ="),
        ("It is 42", "It is 43", "It is"),
        ("A: yes", "A: yes, sir", "A:"),  # either side keeps something
        ("A: yes", "A: yes  ", "A:"),
        ("A: yes\n\n", "A: yes\n", "A:"),
        ("A: yes, sir", "A: yes", "A:"),
        ("A: yes sir", "A: yes", "A:"),
        ("你好吗", "你好呢", "你好"),  # no words to keep whole
        ("नमस्ते दुनिया की", "नमस्ते दुनिया के", "नमस्ते दुनिया"),
        ("Cafe\u0301 e\u0301", "Cafe\u0301 e\u0300", "Cafe\u0301"),  # an accent belongs to its letter
        ("ok: -\u0301", "ok: -\u0300", "ok:"),
        ("a b c d e", "a b c d f", "a b c d"),
    ],
)
def test_the_shared_beginning_of_plain_texts_is_their_prompt(chosen, rejected, prompt):
    record = parse_record({"chosen": chosen, "rejected": rejected}, HERE)
    assert record.prompt == prompt
    assert (record.prompt + record.chosen, record.prompt + record.rejected) == (chosen, rejected)
    assert record.chosen.strip()
    assert record.rejected.strip()


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("Yes.", "No."), ("Yes.", "Yesterday."), (" a", " b"), ("\n\na", "\n\nb"), ("a", "a b"), ("a b", "a"), ("", "a")],
)
def test_no_whole_word_shared_is_no_prompt(chosen, rejected):
    says = "prompt: missing, and chosen and rejected do not begin with the same words; expected a shared prompt"
    assert refusal({"chosen": chosen, "rejected": rejected}) == says


# -------------------------------------------------------------------------------------------------------- real files


def rows_of(file):
    return map(json.loads, file.read_text(encoding="utf-8").splitlines())


def test_transcripts_part_at_the_last_reply(shared_data):
    for row in rows_of(shared_data / "paired" / "hh_format_helpful.jsonl"):
        record = parse_record(row, HERE)
        turns = record.prompt.split("\n\nAssistant:")
        assert len(turns) == row["chosen"].count("\n\nAssistant:") + 1
        assert "\n\nHuman:" not in turns[-1]
        assert record.prompt + record.rejected == row["rejected"]


@pytest.mark.parametrize("folder", ["binary", "paired", "sft"])
def test_every_row_of_every_real_file_is_a_record(shared_data, folder):
    count = 0
    for file in sorted((shared_data / folder).glob("*.jsonl")):
        for row in rows_of(file):
            record = parse_record(row, HERE)
            assert parse_prompt(row, HERE) == (record.prompt, record.tools)
            count += 1
    assert count == {"binary": 2228, "paired": 4270, "sft": 2637}[folder]
