"""Records: what one row of a user's data means, in the formats that TRL's users have.

A row is recognised by its keys, first match first; other keys are ignored, and null fields are absent ones:

| keys                                | meaning                                                                       |
|-------------------------------------|-------------------------------------------------------------------------------|
| [prompt,] chosen, rejected          | a preference pair; without a prompt, the beginning that both share is it      |
| prompt, completion[, label, score]  | one completion                                                                |
| messages[, label, score]            | one completion, the last turn (a prompt beside them repeats the first)        |
| text[, label, score]                | one completion of the empty prompt; only where no other key of these is there |

Texts are plain (a string) or conversational (a list of messages), the same on both sides; but a plain prompt may stand
beside chosen and rejected conversations that both begin with it. A row that means nothing raises `DataError`.
A reader may add `_demonstration` to a pair: "chosen", "rejected" or null, the reply to imitate (see `Paired`).
"""

from __future__ import annotations

import re
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from halos_pl.data.labels import MAX_SCORE as MAX_SCORE
from halos_pl.data.labels import misspelt, parse_label, parse_score
from halos_pl.data.messages import MAX_CHARACTERS as MAX_CHARACTERS
from halos_pl.data.messages import ROLES as ROLES
from halos_pl.data.messages import Message as Message
from halos_pl.data.messages import Text as Text
from halos_pl.data.messages import Tools as Tools
from halos_pl.data.messages import (
    begins_with,
    check_completion,
    check_order,
    check_prompt,
    listed,
    parse_text,
    parse_tools,
    shared_prompt,
)

OnBadRow = Literal["error", "skip"]

SCHEMAS = "the keys prompt+completion[+label], [prompt+]chosen+rejected, messages[+label] or text"
LISTED = 10  # bad rows in one error
_PLACE = re.compile(r"(.+?):(\d+)(: .*)", re.DOTALL)  # file, row and the rest of a message
_NULLABLE = ("label", "_demonstration")


class DataError(ValueError):
    """The user's data cannot be used; the message names file, row, key, what is wrong and what was expected.

    Attributes:
        origin: the row that it is about, if it is about one.
    """

    def __init__(self, *args: object, origin: Origin | None = None) -> None:
        super().__init__(*args)
        self.origin = origin


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
        return DataError(f"{self}: {key}: {wrong}; expected {expected}", origin=self)

    def got(self, key: str, value: object, expected: str, *, near: Iterable[str] = ()) -> DataError:
        """The error about a value that is not what its key promises, and which of some names it may have meant."""
        hint = nearest(value.lower(), near, cutoff=0.75) if isinstance(value, str) else ""
        return self.error(key, f"got {_shown(value)}{hint}", expected)

    def unknown(self, key: str, what: str, name: str, known: Iterable[str]) -> DataError:
        wrong = f"unknown {what} {reprlib.repr(name)}{nearest(name.lower(), known := list(known))}"
        return self.error(key, wrong, f"one of {', '.join(known)}")

    def warn(self, key: str, what: str) -> None:
        warnings.warn(f"{self}: {key}: {what}", DataWarning, stacklevel=2)


@dataclass(frozen=True)
class Unpaired:
    """One completion with a thumbs-up or thumbs-down; `desirable` is None for a demonstration without a label.

    A score is the reward that the data give the completion.
    """

    prompt: Text
    completion: Text
    desirable: bool | None
    origin: Origin
    tools: Tools | None = None
    score: float | None = None


@dataclass(frozen=True)
class Paired:
    """Two completions of one prompt, the first preferred to the second, and which of them SFT imitates, if any."""

    prompt: Text
    chosen: Text
    rejected: Text
    origin: Origin
    tools: Tools | None = None
    demonstration: Literal["chosen", "rejected"] | None = "chosen"

    def member(self, desirable: bool) -> Unpaired:
        completion = self.chosen if desirable else self.rejected
        return Unpaired(self.prompt, completion, desirable, self.origin, self.tools)


Record = Unpaired | Paired


@dataclass
class BadRows:
    """Collects the errors of single rows, so that a user corrects ten at a time and not one.

    The tenth, or else `finish`, raises one DataError that lists them, unless `on_bad_row` is "skip". `origins` are the
    rows of `messages`, one for one; None for an error that does not say.
    """

    on_bad_row: OnBadRow = "error"
    messages: list[str] = field(default_factory=list)
    origins: list[Origin | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row is {self.on_bad_row!r}; expected 'error' or 'skip'")

    @contextmanager
    def caught(self) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            self.messages.append(str(error))
            self.origins.append(error.origin)
            if len(self.messages) == LISTED:
                self.finish(f"the first {LISTED} bad rows")

    def finish(self, what: str = "bad rows") -> None:
        if self.messages and self.on_bad_row == "error":
            kinds = "\n  ".join(_kinds(self.messages))
            raise DataError(f"{what}:\n  {kinds}\ncorrect them, or go on without them: --data.on_bad_row skip")


def _kinds(messages: list[str]) -> Iterator[str]:
    """The first message of each kind, and the rows of those of one file that say the same."""
    kinds: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for message in messages:
        file, row, rest = match.groups() if (match := _PLACE.fullmatch(message)) else (message, "", "")
        kinds.setdefault((file, rest), []).append((message, row))
    for (message, _), *more in kinds.values():
        rows = f": row{'s' * (len(more) > 1)} {', '.join(row for _, row in more)}" if more and more[0][1] else ""
        yield message + (f" (and {len(more)} more like it{rows})" if more else "")


def parse_record(row: object, origin: Origin) -> Record:
    """The meaning of one row; DataError where it fits no schema or a value is not what its key promises."""
    return _Row.of(row, origin, SCHEMAS).record()


def parse_prompt(row: object, origin: Origin) -> tuple[Text, Tools | None]:
    """Prompt and tools as `parse_record` finds them, whatever completions stand there; DataError without one."""
    checked = _Row.of(row, origin, "prompt or messages")
    return (prompt := checked.any_prompt()), checked.tools(prompt)


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """` (did you mean 'x'?)`, or nothing where no name comes near."""
    matches = get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _shown(value: object) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})".replace("\n", " ")


@dataclass(frozen=True)
class _Row:
    """A row under examination: every method returns checked values or raises."""

    row: dict[str, Any]
    origin: Origin

    @classmethod
    def of(cls, row: object, origin: Origin, expected: str) -> _Row:
        if not isinstance(row, Mapping):
            raise DataError(f"{origin}: the row is {_shown(row)}; expected an object with {expected}", origin=origin)
        return cls({key: value for key, value in row.items() if value is not None or key in _NULLABLE}, origin)

    def record(self) -> Record:
        if "chosen" in self.row or "rejected" in self.row:
            prompt, chosen, rejected = self.sides()
            check_prompt(prompt, "prompt", self.origin)
            check_completion(chosen, "chosen", prompt, self.origin)
            check_completion(rejected, "rejected", prompt, self.origin)
            return Paired(prompt, chosen, rejected, self.origin, self.tools(prompt), self.demonstration())
        prompt, completion = self.single()
        score = parse_score(self.row.get("score"), self.origin)
        return Unpaired(prompt, completion, self.label(), self.origin, self.tools(prompt), score)

    def single(self) -> tuple[Text, Text]:
        """Prompt and completion of a row that is no pair."""
        row = self.row
        if "completion" not in row:
            if "messages" in row:
                return self.conversation()
            if "text" in row and "prompt" not in row:
                check_completion(text := self.whole(), "text", "", self.origin)
                return "", text
            if isinstance(row.get("completions"), list) and isinstance(row.get("labels"), list):
                wrong = "stepwise supervision, a label for every step, which nothing here learns from"
                raise self.origin.error("completions", wrong, SCHEMAS)
        check_prompt(prompt := self.text("prompt"), "prompt", self.origin)
        check_completion(completion := self.text("completion"), "completion", prompt, self.origin)
        return prompt, completion

    def any_prompt(self) -> Text:
        """The prompt of any row, whatever completions it has."""
        row, text, key = self.row, None, "prompt"
        if "chosen" in row or "rejected" in row:
            plain = isinstance(row.get("prompt"), str)  # perhaps the first turn of both sides
            if "prompt" not in row or (plain and all(isinstance(row.get(x), list) for x in ("chosen", "rejected"))):
                text = self.sides()[0]
        elif "messages" in row and not ("prompt" in row and "completion" in row):
            text, key = self.messages(), "messages"
            text = text[:-1] if text and text[-1]["role"] == "assistant" else text
        elif "text" in row and "prompt" not in row and "completion" not in row:
            text = self.whole()[:0]
        check_prompt(text := self.text("prompt") if text is None else text, key, self.origin)
        return text

    def missing(self, key: str) -> DataError:
        hint = nearest(key, map(str, self.row))
        return self.origin.error(key, f"missing{hint}, the row's keys are: {listed(self.row)}", SCHEMAS)

    def text(self, key: str) -> Text:
        if key not in self.row:
            raise self.missing(key)
        return parse_text(self.row[key], key, self.origin)

    def whole(self) -> str:
        if isinstance(self.row["text"], str) and isinstance(text := self.text("text"), str):
            return text
        raise self.origin.got("text", self.row["text"], "a string (a conversation goes into `messages`)")

    def messages(self) -> list[Message]:
        if isinstance(messages := self.text("messages"), list):
            return messages
        raise self.origin.got("messages", messages, "a list of messages")

    def conversation(self) -> tuple[Text, Text]:
        check_order(messages := self.messages(), "messages", self.origin)
        if not messages or messages[-1]["role"] != "assistant":
            wrong = f"ends with a turn of {messages[-1]['role']!r}" if messages else "no message"
            raise self.origin.error("messages", wrong, "an assistant's turn at the end, which is the completion")
        check_completion(completion := messages[-1:], "messages", prompt := messages[:-1], self.origin)
        return prompt, completion

    def sides(self) -> tuple[Text, Text, Text]:
        """Prompt, chosen and rejected; where there is no prompt, or both sides repeat it, their shared beginning."""
        chosen, rejected = self.text("chosen"), self.text("rejected")
        if "prompt" in self.row:
            prompt = self.text("prompt")
            if not (begins_with(chosen, prompt) and begins_with(rejected, prompt)):
                return prompt, chosen, rejected
        return shared_prompt(chosen, rejected, self.origin)

    def label(self) -> bool | None:
        if "label" in self.row:
            return parse_label(self.row["label"], self.origin)
        if misspelt(tuple(map(str, self.row))):  # such a row must not become a demonstration
            raise self.missing("label")
        return None

    def demonstration(self) -> Any:
        value = self.row.get("_demonstration", "chosen")
        if value is not None and not (isinstance(value, str) and value in ("chosen", "rejected")):
            raise self.origin.got("_demonstration", value, "'chosen', 'rejected' or null")
        return value

    def tools(self, prompt: Text) -> Tools | None:
        return parse_tools(self.row.get("tools"), prompt, self.origin)
