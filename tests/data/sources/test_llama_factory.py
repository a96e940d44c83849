"""LLaMA-Factory's Alpaca and ShareGPT rows, of the schemas in its data/README.md."""

import pytest

from halos_pl.data.records import DataError, Origin, Paired, parse_record
from halos_pl.data.sources.readers import llama_factory


def read(**row):
    ((_, found),) = llama_factory.read(iter([(Origin("a", 1), row)]))
    return found


def turn(role, content):
    return {"role": role, "content": content}


def test_alpaca():
    assert read(instruction="Do", input="this", output="Done") == {
        "messages": [turn("user", "Do\nthis"), turn("assistant", "Done")]
    }
    row = read(instruction="Do", input="", output="Done", system="Be", history=[["a", "b"], ["c", "d"]], kto_tag=False)
    assert row == {
        "messages": [
            turn("system", "Be"),
            *(turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")),
            *(turn("user", "Do"), turn("assistant", "Done")),
        ],
        "label": False,
    }
    assert parse_record(row, Origin("a", 1)).desirable is False
    assert read(instruction="Do", chosen="x", rejected="y", system=None, history=None, input=None) == {
        "prompt": [turn("user", "Do")],
        "chosen": [turn("assistant", "x")],
        "rejected": [turn("assistant", "y")],
    }


CHAT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]


def test_sharegpt():
    ours = [turn("user", "hi"), turn("assistant", "yo")]
    assert read(conversations=CHAT) == {"messages": ours}
    assert read(conversations=CHAT, kto_tag=True, system="") == {"messages": ours, "label": True}
    assert read(conversations=ours, system="Be") == {"messages": [turn("system", "Be"), *ours]}
    row = read(conversations=CHAT[:1], chosen=CHAT[1], rejected={"role": "assistant", "content": "no"})
    assert row == {"prompt": ours[:1], "chosen": ours[1:], "rejected": [turn("assistant", "no")]}
    assert isinstance(parse_record(row, Origin("a", 1)), Paired)


def test_tools():
    chat = [
        {"from": "system", "value": "Be"},
        {"from": "human", "value": "3+4?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 3, "y": 4}}'},
        {"from": "observation", "value": "7"},
        {"from": "gpt", "value": "It is 7."},
    ]
    row = read(conversations=chat, tools='[{"name": "add"}]')
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 3, "y": 4}}}
    assert row["messages"] == [
        turn("system", "Be"),
        turn("user", "3+4?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        turn("tool", "7"),
        turn("assistant", "It is 7."),
    ]
    assert row["tools"] == '[{"name": "add"}]'
    assert parse_record(row, Origin("a", 1)).completion == [turn("assistant", "It is 7.")]
    both = read(conversations=[{"from": "function_call", "value": '[{"name": "a"}, {"name": "b", "arguments": null}]'}])
    assert [x["function"] for x in both["messages"][0]["tool_calls"]] == [
        {"name": "a", "arguments": {}},
        {"name": "b", "arguments": {}},
    ]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"output": "x"}, "instruction: missing"),
        ({"x" * 99: "x"}, f"instruction: missing, the row's keys are: {'x' * 40}…; expected this key"),
        ({"instruction": "x"}, "output: missing"),
        ({"instruction": "x", "chosen": "y"}, "rejected: missing"),
        ({"instruction": "x", "output": 3}, "output: got 3"),
        ({"instruction": "x", "output": "y", "input": 3}, "input: got 3"),
        ({"instruction": "x", "output": "y", "history": "z"}, "history: got 'z'"),
        ({"instruction": "x", "output": "y", "history": [["z"]]}, "history: got ['z']"),
        ({"conversations": "x"}, "conversations: got 'x'"),
        ({"conversations": []}, "conversations: got []"),
        (
            {"conversations": [{"from": "humans", "value": "x"}]},
            "conversations[0]: unknown speaker 'humans' (did you mean",
        ),
        (
            {"conversations": [CHAT[0], {"from": "gpt"}]},
            "conversations[1]: got {'from': 'gpt'} (dict); expected {from,",
        ),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "conversations[0]: not JSON"),
        ({"conversations": [{"from": "function_call", "value": "[" * 200_000}]}, "conversations[0]: not JSON"),
        (
            {"conversations": [{"from": "x" * 99, "value": "x"}]},
            "conversations[0]: unknown speaker 'xxxxxxxxxxxx...xxx",
        ),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, "conversations[0]: got '[]'"),
        ({"conversations": [{"from": "function_call", "value": '{"name": 3}'}]}, "conversations[0]: got"),
        ({"conversations": CHAT[:1], "chosen": 3, "rejected": "x"}, "chosen: got 3"),
    ],
)
def test_bad_rows_are_named(row, says):
    error = read(**row)
    assert isinstance(error, DataError)
    assert str(error).startswith(f"a:1: {says}")
