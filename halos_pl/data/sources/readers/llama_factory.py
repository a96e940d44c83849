"""LLaMA-Factory's two formats of rows, for SFT, preference pairs and KTO.

Alpaca: `instruction`, `input`, `output`, `system`, `history` (pairs of turns). ShareGPT: `conversations` of
{from, value}, with human, gpt, observation, function_call and system, or of {role, content}; `system`, `tools`. In
both, `kto_tag` is the label, and `chosen` and `rejected` (texts, or single messages) make a pair
(https://github.com/hiyouga/LLaMA-Factory, data/README.md).
"""

from __future__ import annotations

import json
from typing import Any

from halos_pl.data.records import Origin
from halos_pl.data.sources.readers.convert import Row, assistant, each, got, required, text, user

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
    "function": "assistant",
    "system": "system",
}
Messages = list[dict[str, Any]]


def conversation(row: Row, origin: Origin) -> dict[str, Any]:
    """Messages with a label, a pair, or a demonstration."""
    messages = _shared(row, origin) if row.get("conversations") is not None else _alpaca(row, origin)
    if isinstance(system := row.get("system"), str) and system:
        messages = [{"role": "system", "content": system}, *messages]
    extra = {"tools": row["tools"]} if row.get("tools") else {}
    if row.get("chosen") is not None or row.get("rejected") is not None:
        replies = {key: [_reply(row, key, origin)] for key in ("chosen", "rejected")}
        return {"prompt": messages, **replies, **extra}
    if row.get("conversations") is None:
        messages = [*messages, assistant(text(row, "output", origin))]
    if "kto_tag" in row:
        extra["label"] = row["kto_tag"]
    return {"messages": messages, **extra}


def _alpaca(row: Row, origin: Origin) -> Messages:
    history = row.get("history") or []
    expected = "a list of [instruction, response]"
    if not isinstance(history, list):
        raise origin.error("history", f"got {got(history)}", expected)
    messages: Messages = []
    for turns in history:
        if not (isinstance(turns, list) and len(turns) == 2 and all(isinstance(x, str) for x in turns)):
            raise origin.error("history", f"got {got(turns)}", expected)
        messages += [user(turns[0]), assistant(turns[1])]
    asked = [text(row, "instruction", origin), text(row, "input", origin) if row.get("input") else ""]
    return [*messages, user("\n".join(x for x in asked if x))]


def _shared(row: Row, origin: Origin) -> Messages:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise origin.error("conversations", f"got {got(turns)}", "a list of {from, value}")
    return [_message(turn, f"conversations[{i}]", origin) for i, turn in enumerate(turns)]


def _reply(row: Row, key: str, origin: Origin) -> dict[str, Any]:
    value = required(row, key, origin)
    return assistant(value) if isinstance(value, str) else _message(value, key, origin)


def _message(value: object, key: str, origin: Origin) -> dict[str, Any]:
    turn = value if isinstance(value, dict) else {}
    speaker, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(speaker, str) or not isinstance(content, str):
        raise origin.error(key, f"got {got(value)}", "{from, value} or {role, content}")
    if speaker not in SPEAKERS:
        raise origin.unknown(key, "speaker", speaker, SPEAKERS)
    if speaker in ("function_call", "function"):
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, key, origin)}
    return {"role": SPEAKERS[speaker], "content": content}


def _calls(content: str, key: str, origin: Origin) -> list[dict[str, Any]]:
    try:
        calls = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise origin.error(key, f"not JSON: {error}", "a function call {name, arguments}") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(x, dict) and isinstance(x.get("name"), str) for x in calls):
        raise origin.error(key, f"got {got(content)}", "a function call {name, arguments}, or several")
    return [{"type": "function", "function": {"name": x["name"], "arguments": x.get("arguments") or {}}} for x in calls]


read = each(conversation)
