"""Events of a feedback log as rows: the last of each id, in the schema of `parse_record`.

The format and how to append to it stand in `halos_pl.feedback_log`. A service may be writing the file that is read: it
is read up to its size at opening, and the reader `events` leaves out a last line that is torn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halos_pl.data.labels import misspelt
from halos_pl.data.messages import listed
from halos_pl.data.records import DataError, Origin, nearest
from halos_pl.data.sources.rows import Rows
from halos_pl.feedback_log import VERSION

KINDS = ("feedback", "retraction")
KEPT = ("prompt", "completion", "label", "score", "tools")


def read(rows: Rows) -> Rows:
    """What counts of a log, each id at the place where it first appeared, with the origin of the line that won.

    Retracted ids are left out. A DataError stands for a row that is no event, at once, and for a last event that is no
    judgement, in its place. Holds one entry an id until the rows end; those of a folder's logs go through it together.

    Args:
        rows: parsed objects, in the order of writing; a DataError for an unreadable row passes.
    """
    latest: dict[str, tuple[Origin, object] | None] = {}
    for origin, row in rows:
        try:
            event = _event(row, origin)
        except DataError as error:
            yield origin, error
            continue
        name = event["id"]
        if event["event"] == "feedback":
            latest[name] = origin, _judgement(event, origin)
        elif name in latest:
            latest[name] = None
    yield from (entry for entry in latest.values() if entry)


def _event(row: object, origin: Origin) -> Mapping[str, Any]:
    """The row, with a version, a kind and an id that are known."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise origin.got("event", row, "an object with event and id")
    if "event" not in row:
        wrong = f"missing{nearest('event', map(str, row))}, the row's keys are: {listed(row)}"
        raise origin.error("event", wrong, " or ".join(KINDS))
    if (version := row.get("v", VERSION)) != VERSION:
        raise origin.got("v", version, f"{VERSION}, the format that this version of halos-pl reads")
    if (kind := row["event"]) not in KINDS:
        raise origin.got("event", kind, " or ".join(KINDS), near=KINDS)
    if not (isinstance(name := row.get("id"), str) and name):
        raise origin.got("id", name, "a string that names the completion")
    return row


def _judgement(event: Mapping[str, Any], origin: Origin) -> dict[str, Any] | DataError:
    row = {key: event[key] for key in KEPT if event.get(key) is not None}
    if "label" not in event and misspelt(tuple(map(str, event))):
        return origin.error("label", f"missing, the event's keys are: {listed(event)}", "true or false")
    if "label" not in row and "score" not in row:
        return origin.error("label", "neither label nor score", "at least one")
    return row
