"""Records: what one row of a user's data means, in the formats that TRL's users have.

A row is recognised by its keys, first match first: `[prompt,] chosen, rejected` is a preference pair,
`prompt, completion[, label][, score]` and `messages[, label][, score]` are single completions. Texts are plain (a
string) or conversational (a list of messages), the same on both sides. A row that means nothing raises `DataError`.
"""

from __future__ import annotations

import json
import re
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, Literal

Message = dict[str, Any]
"""One turn: `role`, `content` and, of an assistant, `tool_calls`."""
Text = str | list[Message]
OnBadRow = Literal["error", "skip"]

ROLES = ("system", "developer", "user", "assistant", "tool")
SCHEMAS = "the keys prompt+completion[+label], [prompt+]chosen+rejected or messages[+label]"
LISTED = 10  # bad rows in one error
MAX_SCORE = 1e6  # a larger reward only destroys weights
MAX_CHARACTERS = 1_000_000  # a longer field earns a DataWarning
_UNFIT = re.compile("[\0\ud800-\udfff]")  # no tokenizer takes these
_LABELS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class DataError(ValueError):
    """The user's data cannot be used; the message names file, row, key, what is wrong and what was expected."""


class DataWarning(UserWarning):
    """The user's data can be used, but perhaps not as they meant."""


@dataclass(frozen=True)
class Origin:
    """Where a row comes from: its file (or hub dataset) and its number, counted from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"

    def error(self, key: str, wrong: str, expected: str) -> DataError:
        """The one form of an error about a row: `FILE:ROW: KEY: what is wrong; expected ...`."""
        return DataError(f"{self}: {key}: {wrong}; expected {expected}")


@dataclass(frozen=True)
class Unpaired:
    """One completion with a thumbs-up or thumbs-down; `desirable` is None for a demonstration without a label.

    A score is the reward that the data give the completion.
    """

    prompt: Text
    completion: Text
    desirable: bool | None
    origin: Origin
    tools: list[dict[str, Any]] | None = None
    score: float | None = None


@dataclass(frozen=True)
class Paired:
    """Two completions of one prompt, the first preferred to the second."""

    prompt: Text
    chosen: Text
    rejected: Text
    origin: Origin
    tools: list[dict[str, Any]] | None = None

    def member(self, desirable: bool) -> Unpaired:
        completion = self.chosen if desirable else self.rejected
        return Unpaired(self.prompt, completion, desirable, self.origin, self.tools)


Record = Unpaired | Paired


@dataclass
class BadRows:
    """Collects the errors of single rows, so that a user corrects ten at a time and not one.

    The tenth, or else `finish`, raises one DataError that lists them, unless `on_bad_row` is "skip".
    """

    on_bad_row: OnBadRow = "error"
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row is {self.on_bad_row!r}; expected 'error' or 'skip'")

    @contextmanager
    def caught(self) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            self.messages.append(str(error))
            if len(self.messages) == LISTED:
                self.finish(f"the first {LISTED} bad rows")

    def finish(self, what: str = "bad rows") -> None:
        if self.messages and self.on_bad_row == "error":
            listed = "\n  ".join(self.messages)
            raise DataError(f"{what}:\n  {listed}\ncorrect them, or go on without them: --data.on_bad_row skip")


def parse_record(row: object, origin: Origin) -> Record:
    """The meaning of one row; DataError where it fits no schema or a value is not what its key promises."""
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: the row is {_got(row)}; expected an object with {SCHEMAS}")
    return _Row({key: value for key, value in row.items() if value is not None or key == "label"}, origin).record()


def parse_prompt(row: object, origin: Origin) -> tuple[Text, list[dict[str, Any]] | None]:
    """Prompt and tools of a row, whatever completions it has beside it; DataError where no completion can follow."""
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: the row is {_got(row)}; expected an object with prompt or messages")
    checked = _Row({key: value for key, value in row.items() if value is not None}, origin)
    keys = checked.row
    if "chosen" in keys and "prompt" not in keys:
        return (pair := checked.paired()).prompt, pair.tools
    key = "messages" if "messages" in keys and "prompt" not in keys else "prompt"
    text: Text = checked.messages() if key == "messages" else checked.text(key)
    if key == "messages" and text and text[-1]["role"] == "assistant":  # type: ignore[index]
        text = text[:-1]
    return (prompt := checked.prompt(text, key)), checked.tools(prompt)


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """` (did you mean 'x'?)`, or nothing where no name comes near."""
    matches = get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


@dataclass(frozen=True)
class _Row:
    """A row under examination: every method returns checked values or raises."""

    row: Mapping[str, Any]
    origin: Origin

    def record(self) -> Record:
        if "chosen" in self.row or "rejected" in self.row:
            return self.paired()
        if "messages" in self.row and "completion" not in self.row:
            messages = self.messages()
            prompt = self.prompt(messages[:-1], "messages")
            completion = self.completion(messages[-1:], "messages", prompt)
        else:
            prompt = self.prompt(self.text("prompt"), "prompt")
            completion = self.completion(self.text("completion"), "completion", prompt)
        return Unpaired(prompt, completion, self.label(), self.origin, self.tools(prompt), self.score())

    def messages(self) -> list[Message]:
        messages = self.text("messages")
        if isinstance(messages, str):
            raise self.origin.error("messages", f"got {_got(messages)}", "a list of messages")
        return messages

    def paired(self) -> Paired:
        chosen, rejected = self.text("chosen"), self.text("rejected")
        if "prompt" in self.row:
            prompt = self.text("prompt")
        else:
            prompt, chosen, rejected = self.shared_prompt(chosen, rejected)
        prompt = self.prompt(prompt, "prompt")
        chosen = self.completion(chosen, "chosen", prompt)
        rejected = self.completion(rejected, "rejected", prompt)
        return Paired(prompt, chosen, rejected, self.origin, self.tools(prompt))

    def missing(self, key: str) -> DataError:
        hint, keys = nearest(key, map(str, self.row)), ", ".join(map(str, self.row)) or "none"
        return self.origin.error(key, f"missing{hint}, the row's keys are: {keys}", SCHEMAS)

    def text(self, key: str) -> Text:
        if key not in self.row:
            raise self.missing(key)
        value = self.row[key]
        if not isinstance(value, str | list):
            raise self.origin.error(key, f"got {_got(value)}", "a string or a list of messages")
        self.characters(key, value)
        return value if isinstance(value, str) else [self.message(f"{key}[{i}]", x) for i, x in enumerate(value)]

    def characters(self, key: str, value: object) -> None:
        size = 0
        for text in _strings(value):
            size += len(text)
            if unfit := _UNFIT.search(text):
                wrong = "a null byte" if unfit[0] == "\0" else "half a surrogate pair"
                raise self.origin.error(key, f"{wrong} at character {unfit.start()}", "text")
        if size > MAX_CHARACTERS:
            warnings.warn(f"{self.origin}: {key}: {size:,} characters, most will be cut off", DataWarning, stacklevel=2)

    def message(self, key: str, value: object) -> Message:
        if not isinstance(value, Mapping):
            raise self.origin.error(key, f"got {_got(value)}", "a message {role, content}")
        message = {k: x for k, x in value.items() if x is not None}  # Parquet fills absent keys with null
        if message.get("tool_calls"):
            message.setdefault("content", "")
        for part in ("role", "content"):
            if part not in message:
                wrong = "null" if part in value else f"missing, the message's keys are: {', '.join(map(str, value))}"
                raise self.origin.error(f"{key}.{part}", wrong, "a string (content may be null beside tool_calls)")
            if not isinstance(message[part], str):
                raise self.origin.error(f"{key}.{part}", f"got {_got(message[part])}", "a string")
        if (role := message["role"]) not in ROLES:
            wrong = f"unknown role {role!r}{nearest(role.lower(), ROLES)}"
            raise self.origin.error(f"{key}.role", wrong, f"one of {', '.join(ROLES)}")
        return message

    def shared_prompt(self, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise self.origin.error("prompt", "missing beside plain chosen and rejected", "a string")
        if chosen == rejected:
            raise self.origin.error("chosen", "the same messages as rejected", "another reply")
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        if not shared:
            raise self.origin.error("prompt", "missing, and chosen and rejected begin differently", "a shared prompt")
        return chosen[:shared], chosen[shared:], rejected[shared:]

    def prompt(self, text: Text, key: str) -> Text:
        if isinstance(text, list) and (not text or text[-1]["role"] == "assistant"):
            raise self.origin.error(key, "no turn to reply to", "messages of which a user's (or a tool's) comes last")
        return text

    def completion(self, text: Text, key: str, prompt: Text) -> Text:
        if isinstance(text, str) != isinstance(prompt, str):
            wrong = f"a {type(text).__name__} beside a {type(prompt).__name__} as the prompt"
            raise self.origin.error(key, wrong, "both plain (str) or both conversational (list of messages)")
        if isinstance(text, list) and (not text or text[0]["role"] != "assistant"):
            wrong = f"begins with a turn of {text[0]['role']!r}" if text else "no message"
            raise self.origin.error(key, wrong, "an assistant's turn")
        replies = [{"role": "assistant", "content": text}] if isinstance(text, str) else text
        if any(x["role"] == "assistant" and not x["content"].strip() and not x.get("tool_calls") for x in replies):
            raise self.origin.error(key, "an empty completion", "some text")
        return text

    def label(self) -> bool | None:
        if "label" not in self.row:
            if nearest("label", map(str, self.row), cutoff=0.8):  # a misspelt label must not become a demonstration
                raise self.missing("label")
            return None
        value = self.row["label"]
        parsed = _LABELS.get(value.strip().lower()) if isinstance(value, str) else value
        if not (isinstance(parsed, int | float) and parsed in (0, 1)):
            raise self.origin.error("label", f"got {_got(value)}", "true or false (or 1/0, yes/no)")
        return bool(parsed)

    def score(self) -> float | None:
        value = self.row.get("score")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_SCORE:
            raise self.origin.error("score", f"got {_got(value)}", f"a number within ±{MAX_SCORE:,.0f}")
        return float(value)

    def tools(self, prompt: Text) -> list[dict[str, Any]] | None:
        value = self.row.get("tools")
        try:
            tools = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            tools = value
        if not tools:
            return None
        if not isinstance(tools, list) or not all(isinstance(x, dict) for x in tools):
            raise self.origin.error("tools", f"got {_got(value)}", "a list of tool schemas, or that as JSON")
        if isinstance(prompt, str):
            raise self.origin.error("tools", "given beside a plain prompt", "a conversational prompt")
        self.characters("tools", tools)
        return tools


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(part)


def _got(value: object) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"
