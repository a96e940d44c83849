"""Messages: what a text may be, plain or conversational, which turn follows which, and where two texts part.

The order of turns:

| after                            | may come                                     |
|----------------------------------|----------------------------------------------|
| the beginning, system, developer | system, developer (only here) or user        |
| user                             | assistant                                    |
| assistant                        | user, or tool where the turn has tool calls  |
| tool                             | tool or assistant                            |

The content of a message is a string. A list of text parts (`{"type": "text", "text": ...}`) is joined, with nothing
between the parts, as chat templates write them; other parts (images, sound) are refused.
A prompt ends with a user's or a tool's turn, a completion begins and ends with an assistant's.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import TYPE_CHECKING, Any
from unicodedata import category, east_asian_width

if TYPE_CHECKING:
    from halos_pl.data.records import Origin

Message = dict[str, Any]
"""One turn: `role`, `content` and, of an assistant, `tool_calls`."""
Text = str | list[Message]
Tools = list[dict[str, Any]]
"""JSON schemas of functions that an assistant may call."""

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_CHARACTERS = 1_000_000  # a longer field earns a DataWarning
BOTH = "both plain (str) or both conversational (list of messages)"
_UNFIT = re.compile("[\0\ud800-\udfff]")  # no tokenizer takes these
_BEGINNING = ("system", "developer", "user")
_FOLLOWING: dict[str | None, tuple[str, ...]] = {
    None: _BEGINNING,
    "system": _BEGINNING,
    "developer": _BEGINNING,
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("assistant", "tool"),
}


def parse_text(value: object, key: str, origin: Origin) -> Text:
    """A string as it is, or checked messages, null fields left out; DataError for all else."""
    text: Text
    if isinstance(value, str):
        text, size = value, count_characters(value, key, origin)
    elif isinstance(value, list):
        text = [_message(x, f"{key}[{i}]", origin) for i, x in enumerate(value)]
        size = sum([count_characters(x, key, origin, message=i) for i, x in enumerate(text)])
    else:
        raise origin.got(key, value, "a string or a list of messages")
    if size > MAX_CHARACTERS:
        origin.warn(key, f"{size:,} characters, most will be cut off")
    return text


def _message(value: object, key: str, origin: Origin) -> Message:
    if not isinstance(value, Mapping):
        raise origin.got(key, value, "a message {role, content}")
    message = {k: x for k, x in value.items() if x is not None}  # Parquet fills absent keys with null
    if message.get("tool_calls"):
        message.setdefault("content", "")
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], f"{key}.content", origin)
    for part in ("role", "content"):
        if part not in message:
            wrong = "null" if part in value else f"missing, the message's keys are: {listed(value)}"
            raise origin.error(f"{key}.{part}", wrong, "a string (content may be null beside tool_calls)")
        if not isinstance(message[part], str):
            raise origin.got(f"{key}.{part}", message[part], "a string")
    if (role := message["role"]) not in ROLES:
        raise origin.unknown(f"{key}.role", "role", role, ROLES)
    return message


def _joined(parts: list[object], key: str, origin: Origin) -> str:
    texts = []
    for i, part in enumerate(parts):
        if not isinstance(part, Mapping):
            break
        if part.get("type") != "text":
            raise origin.got(f"{key}[{i}].type", part.get("type"), "'text': images, sound and the like are not read")
        if not isinstance(text := part.get("text"), str):
            raise origin.got(f"{key}[{i}].text", text, "a string")
        texts.append(text)
    if not parts or len(texts) < len(parts):
        raise origin.got(key, parts, "a string, or a list of parts {type: text, text}")
    return "".join(texts)


def listed(keys: Iterable[object]) -> str:
    """The keys of a row or a message, or names of another kind, for an error of one line."""
    names = list(map(str, keys))
    shown = ", ".join(brief(x if x.isprintable() else ascii(x), 40) for x in names[:20])
    return (shown + f" and {len(names) - 20} more" * (len(names) > 20)) or "none"


def brief(text: str, size: int = 200) -> str:
    """The beginning of a text, for an error of one line: what cannot be printed is escaped."""
    shown = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text[: size + 1])
    return shown if len(shown) <= size else f"{shown[:size]}…"


def count_characters(value: object, key: str, origin: Origin, *, message: int | None = None) -> int:
    """Characters of all strings in a value; DataError where one is a null byte or half a surrogate pair."""
    size, rest = 0, [value]
    while rest:
        part = rest.pop()
        if isinstance(part, str):
            size += len(part)
            if ("\0" in part or not part.isascii()) and (unfit := _UNFIT.search(part)):
                wrong = "a null byte" if unfit[0] == "\0" else "half a surrogate pair"
                place = f"character {unfit.start()}" + (f" of message {message}" if message is not None else "")
                raise origin.error(key, f"{wrong} at {place}", "text")
        elif isinstance(part, list):
            rest += part
        elif isinstance(part, Mapping):
            rest += part.values()
    return size


def check_order(messages: list[Message], key: str, origin: Origin, *, before: Message | None = None) -> None:
    """DataError at the first turn that may not follow the one before it.

    Args:
        messages: some turns, which `_message` checked.
        key: where they stand.
        origin: of the row.
        before: the turn that they go on from; None: they begin the conversation.
    """
    for i, message in enumerate(messages):
        last = None if before is None else before["role"]
        allowed = _FOLLOWING[last]
        if before is not None and before.get("tool_calls") and last == "assistant":
            allowed = ("tool", "user")
        if (role := message["role"]) not in allowed:
            place = "at the beginning" if last is None else f"after {last!r}"
            raise origin.error(f"{key}[{i}].role", f"{role!r} {place}", " or ".join(map(repr, allowed)))
        before = message


def check_prompt(text: Text, key: str, origin: Origin) -> None:
    """DataError where turns are out of order or the last is none to reply to."""
    if isinstance(text, list):
        check_order(text, key, origin)
        if not text or text[-1]["role"] not in ("user", "tool"):
            raise origin.error(key, "no turn to reply to", "messages of which a user's (or a tool's) comes last")


def check_completion(text: Text, key: str, prompt: Text, origin: Origin) -> None:
    """DataError where a completion is empty, of another kind than its prompt, or not an assistant's from end to end."""
    if isinstance(text, str) != isinstance(prompt, str):
        wrong = f"a {type(text).__name__} beside a {type(prompt).__name__} as the prompt"
        raise origin.error(key, wrong, BOTH)
    empty = isinstance(text, str) and not text.strip()
    if isinstance(text, list) and isinstance(prompt, list):
        if not text or text[0]["role"] != "assistant":
            wrong = f"begins with a turn of {text[0]['role']!r}" if text else "no message"
            raise origin.error(key, wrong, "an assistant's turn")
        check_order(text, key, origin, before=prompt[-1])
        if (role := text[-1]["role"]) != "assistant":
            raise origin.error(key, f"ends with a turn of {role!r}", "an assistant's turn at the end")
        for turn in text:
            empty |= turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls")
    if empty:
        raise origin.error(key, "an empty completion", "some text")


def parse_tools(value: object, prompt: Text, origin: Origin) -> Tools | None:
    """The tool schemas beside a conversational prompt, given as a list or as its JSON; None for none."""
    tools: Any = value
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except (ValueError, RecursionError):
            tools = value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(x, dict) for x in tools):
        raise origin.got("tools", value, "a list of tool schemas, or that as JSON")
    if isinstance(prompt, str):
        raise origin.error("tools", "given beside a plain prompt", "a conversational prompt")
    count_characters(tools, "tools", origin)
    return tools


def begins_with(text: Text, prompt: Text) -> bool:
    """Whether a conversation begins with a user's turn that says this very prompt."""
    return (
        isinstance(prompt, str)
        and isinstance(text, list)
        and bool(text)
        and (text[0]["role"], text[0]["content"]) == ("user", prompt)
    )


def shared_prompt(chosen: Text, rejected: Text, origin: Origin) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected, where the prompt is the beginning that both texts share; DataError without one."""
    kind = "text" if isinstance(chosen, str) else "messages"
    if chosen == rejected:
        raise origin.error("chosen", f"the same {kind} as rejected", "another reply")
    if isinstance(chosen, str) and isinstance(rejected, str):
        size, wrong = shared_characters(chosen, rejected), "do not begin with the same words"
    elif isinstance(chosen, list) and isinstance(rejected, list):
        check_order(chosen, "chosen", origin)
        check_order(rejected, "rejected", origin)
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
        size, wrong = sum(1 for _ in shared), "begin differently"
    else:
        wrong = f"a {type(rejected).__name__} beside a {type(chosen).__name__} as chosen"
        raise origin.error("rejected", wrong, BOTH)
    if not size:
        raise origin.error("prompt", f"missing, and chosen and rejected {wrong}", "a shared prompt")
    return chosen[:size], chosen[size:], rejected[size:]


def shared_characters(chosen: str, rejected: str) -> int:
    """Where the prompt ends that two plain texts share; 0 where they share none.

    It is their longest common beginning, moved back until (1) either text goes on with more than white space and
    (2) the cut is inside no word of either: not between two letters, digits, underscores or apostrophes, and not before
    a combining mark. Wide characters (Chinese, Japanese, Korean) stand for themselves. If the prompt now ends in a
    space, that one belongs to the completions, as in TRL; a line break stays with the prompt. A prompt of white space
    alone is none.
    """
    limit = min(len(chosen.rstrip()), len(rejected.rstrip())) - 1
    size = bisect_left(range(limit), True, key=lambda i: chosen[: i + 1] != rejected[: i + 1])
    while size and (_inside_word(chosen, size) or _inside_word(rejected, size)):
        size -= 1
    if size and chosen[size - 1] == " ":
        size -= 1
    return size if chosen[:size].strip() else 0


def _inside_word(text: str, cut: int) -> bool:
    before, after = text[cut - 1], text[cut]
    return category(after)[0] == "M" or (_of_word(before) and _of_word(after))


def _of_word(character: str) -> bool:
    if character in "_'’":
        return True
    return category(character)[0] in "LMN" and east_asian_width(character) not in ("W", "F")
