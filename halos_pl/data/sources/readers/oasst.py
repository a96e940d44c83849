"""OpenAssistant conversations: trees of messages whose sibling replies people ranked.

Rows are messages with `message_id`, `parent_id` (null for the first of a tree), `role` (prompter or assistant), `text`,
`lang`, `rank` (0 is best; null for what was not ranked), `deleted` and `review_result`
(https://huggingface.co/datasets/OpenAssistant/oasst1). As in the KTO paper's code, a pair is made of English replies to
one message whose ranks are neighbours, the prompt is the thread down to that message, all of it English, and runs of
spaces become one. Unlike there, SFT imitates the best reply (rank 0), once a prompt, and not the last one.

Messages that were deleted or rejected by reviewers are left out with all that follows them. So are, with a DataWarning,
those whose parent is in no row. An id that stands twice, and a thread that comes back to itself, are refused.
"""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from halos_pl.data.records import DataError, DataWarning, Origin
from halos_pl.data.sources.readers.convert import Row, assistant, got, mapping, single_spaced, text, user
from halos_pl.data.sources.rows import Rows

ROLES = ("prompter", "assistant")
LANGUAGE = "en"


@dataclass(frozen=True)
class _Message:
    origin: Origin
    parent: str | None
    role: str
    text: str
    rank: int | None

    @property
    def turn(self) -> dict[str, Any]:
        return (user if self.role == "prompter" else assistant)(single_spaced(self.text))


def read(rows: Rows) -> Rows:
    """Pairs, one for each reply that has a next better one, at the place of the worse; errors come first."""
    messages: dict[str, _Message | None] = {}  # None: left out
    for origin, line in rows:
        try:
            row = mapping(line, origin)
            if (name := text(row, "message_id", origin)) in messages:
                raise origin.error("message_id", f"{reprlib.repr(name)} stands twice", "ids that are unique")
            messages[name] = _message(row, origin)
        except DataError as error:
            yield origin, error
    orphans: dict[str, Origin] = {}
    for parent, replies in _ranked(messages).items():
        try:
            prompt = _thread(parent, messages, orphans, replies[0].origin)
        except DataError as error:
            yield replies[0].origin, error
            continue
        if prompt is not None:
            yield from _pairs(prompt, replies)
    if orphans:
        first = next(iter(orphans.values()))
        what = f"{len(orphans)} messages are replied to but are in no row: what follows them is left out"
        warnings.warn(f"{first}: parent_id: {what}", DataWarning, stacklevel=2)


def _message(row: Row, origin: Origin) -> _Message | None:
    parent, role, rank = row.get("parent_id"), text(row, "role", origin), row.get("rank")
    if role not in ROLES:
        raise origin.error("role", f"got {got(role)}", " or ".join(ROLES))
    if not (parent is None or isinstance(parent, str)):
        raise origin.error("parent_id", f"got {got(parent)}", "a string, or null for the first message")
    rank = None if rank != rank else rank  # NaN is how pandas writes null
    whole = rank.is_integer() if isinstance(rank, float) else isinstance(rank, int) and not isinstance(rank, bool)
    if rank is not None and not whole:
        raise origin.error("rank", f"got {got(rank)}", "a whole number, 0 for the best, or null")
    foreign = row.get("lang") not in (None, LANGUAGE)
    if foreign or row.get("deleted") is True or row.get("review_result") is False:
        return None
    return _Message(origin, parent or None, role, text(row, "text", origin), None if rank is None else int(rank))


def _ranked(messages: dict[str, _Message | None]) -> dict[str, list[_Message]]:
    """Parent -> its ranked replies of the assistant, best first."""
    siblings: dict[str, list[_Message]] = {}
    for message in messages.values():
        if message and message.parent is not None and message.rank is not None and message.role == "assistant":
            siblings.setdefault(message.parent, []).append(message)
    return {parent: sorted(replies, key=lambda x: x.rank or 0) for parent, replies in siblings.items()}


def _thread(
    name: str, messages: dict[str, _Message | None], orphans: dict[str, Origin], origin: Origin
) -> list[dict[str, Any]] | None:
    """The turns from the tree's first message to the named one; None where one of them is not there."""
    thread: list[_Message] = []
    passed: set[str] = set()
    at: str | None = name
    while at is not None:
        if at in passed:
            raise origin.error("parent_id", f"the thread comes back to {reprlib.repr(at)}", "a tree of messages")
        passed.add(at)
        if (message := messages.get(at)) is None:
            if at not in messages:
                orphans.setdefault(at, origin)
            return None
        thread.append(message)
        at, origin = message.parent, message.origin
    return [message.turn for message in reversed(thread)]


def _pairs(prompt: list[dict[str, Any]], replies: list[_Message]) -> Iterator[tuple[Origin, object]]:
    best: dict[int, _Message] = {}
    for reply in replies:
        best.setdefault(reply.rank or 0, reply)
    mark: str | None = "chosen"
    for reply in replies:
        better = best.get((reply.rank or 0) - 1)
        if better is not None:
            yield (
                reply.origin,
                {"prompt": prompt, "chosen": [better.turn], "rejected": [reply.turn], "_demonstration": mark},
            )
            mark = None
