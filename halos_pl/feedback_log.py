"""A log of feedback that a service appends to while training reads it: the format, and an `append` that is atomic.

The format is JSONL, one event a line: a JSON object in UTF-8, ended by a newline.

| key | in an event | is |
|---|---|---|
| `v` | may be absent | 1, the version of this format |
| `event` | always | "feedback", or "retraction" of what the id names |
| `id` | always | non-empty string that names the judged completion; by default a new UUID4 |
| `time` | may be absent | RFC 3339 in UTC (`2026-01-31T12:00:00.000Z`); by default now; not read by training |
| `prompt` | feedback | string, or list of messages that ends with a user's or a tool's; training checks all turns |
| `completion` | feedback | of the prompt's kind, not empty; messages begin and end with an assistant's |
| `label` | feedback, unless it has a score | true (thumbs up) or false |
| `score` | feedback, unless it has a label | number within ±1,000,000 |
| `tools` | feedback, if any | list of tool schemas, beside messages |
| `meta` | feedback, if any | object of the service's own; kept, and not read by training |

Of several events with one id the last line counts: who changes their mind appends again, and a retraction takes all
of it back (so let a client name only ids that are its own). `halos_pl.data.sources.events` reads it.

Any number of threads and processes may append to a log and read it, on several hosts too where the file system's
`flock` reaches all of them (NFS does on Linux); elsewhere write a log per host into one folder. A log may be renamed
while it is written (rotation): the next event begins a new one. A writer holds an exclusive lock. It may be killed at
any time: what it leaves of a line, the next writer moves to the end of `LOG.torn`, and no reader sees it.

A handler of a web service (a plain `def`, which FastAPI runs in a thread; in an `async def`, `asyncio.to_thread`):

>>> import tempfile
>>> from pathlib import Path
>>> from halos_pl import feedback_log
>>> LOG = Path(tempfile.mkdtemp(), "feedback.jsonl")
>>> def thumbs(body):
...     try:
...         keys = {key: body.get(key) for key in ("prompt", "completion", "label", "id")}
...         return 200, feedback_log.append(LOG, **keys)
...     except ValueError as error:  # of what the client sent; an OSError is ours: the event is not in the log
...         return 422, str(error)
>>> thumbs({"prompt": "2+2=", "completion": " 4", "label": True, "id": "reply-17"})
(200, 'reply-17')
>>> thumbs({"prompt": "2+2=", "completion": " 4", "label": "up"})
(422, "label: got 'up' (str); expected true or false")
>>> feedback_log.retract(LOG, "reply-17")
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import Any
from uuid import uuid4

Messages = list[dict[str, Any]]
Path = str | os.PathLike[str]

VERSION = 1
# The rules of halos_pl.data.records, which a service does not import; a test holds them together.
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_SCORE = 1e6

_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_UNFIT = re.compile(r"[\ud800-\udfff]|(?<!\\)(\\\\)*\\u0000")  # in JSON; no tokenizer takes these
_BEGINNINGS = b"{ \t\r\n\0\xef"  # of a log: an event, blanks, what a power cut leaves, a byte order mark

fcntl: Any = None
with suppress(ImportError):  # Windows has none
    fcntl = importlib.import_module("fcntl")


def append(
    path: Path,
    *,
    prompt: str | Messages,
    completion: str | Messages,
    label: bool | None = None,
    score: float | None = None,
    id: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    meta: dict[str, Any] | None = None,
    time: datetime | str | None = None,
    fsync: bool = True,
) -> str:
    """Append one judgement of a completion; its id.

    The event is in the log, whole and for every reader, when this returns, and is not when it raises.

    Args:
        path: the log, made where there is none (its mode by the umask); its folder is not made.
        prompt, completion, label, score, id, tools, meta, time: as the table above has them; a datetime of another
            zone is converted. An id that is in the log already replaces the earlier judgement.
        fsync: return only when the disk has it; without, a power cut (no crash) can lose the last seconds.

    Raises:
        ValueError: an unfit value, named by its key, or `path` is a file of another kind. Nothing was written.
        OSError: the log cannot be opened, locked (Windows: never) or written; a full disk leaves it as it was.
    """
    body = {"prompt": prompt, "completion": completion, "label": label, "score": score, "tools": tools, "meta": meta}
    _check(**body)
    event = _head("feedback", str(uuid4()) if id is None else id, time)
    _write(path, event | {key: x for key, x in body.items() if x is not None}, fsync)
    return str(event["id"])


def retract(path: Path, id: str, *, fsync: bool = True) -> None:
    """Take back what was judged under an id, in this log or in one that was rotated away; arguments as of `append`."""
    _write(path, _head("retraction", id, None), fsync)


def snapshot_size(path: Path | int) -> int:
    """How many bytes of a log are whole events at this moment, taken while no writer is in the midst of one.

    That is all up to the last newline, and a last line that lacks but this. No writer changes these bytes, so a reader
    takes the size once and reads no further; `path` may be its open file's descriptor, whose position is kept.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    with open(path, "rb", buffering=0, closefd=not isinstance(path, int), opener=_at_once) as file:
        position = file.tell()
        with _locked(file.fileno(), shared=True):
            size, tail = _end(file.fileno())
        file.seek(position)
        return size if _complete(tail) else size - len(tail)


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait for it


def _write(path: Path, event: dict[str, Any], fsync: bool) -> None:
    line = "{" + ", ".join(f'"{key}": {_json(key, value)}' for key, value in event.items()) + "}\n"
    for _ in range(100):  # more often no log is rotated away while one event waits
        with _opened(path) as fd, _locked(fd), suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):  # else it was rotated away while we waited
                return _append_line(fd, path, line.encode("ascii"), fsync)
    raise OSError(errno.ESTALE, "the log is replaced again and again", path)


@contextmanager
def _opened(path: Path, flags: int = os.O_RDWR | os.O_APPEND | os.O_CREAT, mode: int = 0o666) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _locked(fd: int, *, shared: bool = False) -> Iterator[None]:
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, "no file locks on this platform")
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except OSError as error:
        unsupported = error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
        if not (shared and unsupported):  # a reader needs no lock where nobody can append
            raise
    try:
        yield
    finally:  # closing is not enough: a child forked meanwhile has the same open file
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)


def _append_line(fd: int, path: Path, line: bytes, fsync: bool) -> None:
    """Under the lock: mend the end of the log, then write the line."""
    size, tail = _end(fd)
    begin = _read(fd, 0, 1)
    _require(
        begin in _BEGINNINGS, os.fspath(path), f"no feedback log, it begins with {begin!r}", "one JSON object a line"
    )
    if _complete(tail):
        line = b"\n" + line
    elif tail:
        with _opened(os.fspath(path) + ".torn", mode=stat.S_IMODE(os.fstat(fd).st_mode)) as torn:
            _extend(torn, os.fstat(torn).st_size, tail + b"\n", fsync)
        size -= len(tail)
        os.ftruncate(fd, size)
    _extend(fd, size, line, fsync)
    if fsync and not size:  # the name of a new file is durable when its folder is
        with suppress(OSError), _opened(os.path.dirname(os.fspath(path)) or ".", os.O_RDONLY) as folder:
            os.fsync(folder)


def _extend(fd: int, size: int, data: bytes, fsync: bool) -> None:
    """All of the data at the end of a file of this size, in one write, or nothing."""
    try:
        left = memoryview(data)
        while left:  # one write; a second one, after a short one, says why it was short
            if not (written := os.write(fd, left)):
                raise OSError(errno.EIO, "short write")
            left = left[written:]
        if fsync:
            os.fsync(fd)
    except BaseException:
        with suppress(OSError):  # what this leaves, the next writer moves aside
            os.ftruncate(fd, size)
        raise


def _end(fd: int) -> tuple[int, bytes]:
    """The size of a log, and what stands behind its last newline."""
    status, tail = os.fstat(fd), b""
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "the log is no regular file")
    size = status.st_size
    while len(tail) < size and b"\n" not in tail:
        step = min(max(1, len(tail)), size - len(tail))
        if len(block := _read(fd, size - len(tail) - step, step)) < step:
            raise OSError(errno.EIO, "the log was cut while it was read")
        tail = block + tail
    return size, tail.rpartition(b"\n")[2]


def _read(fd: int, offset: int, count: int) -> bytes:
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, count)


def _complete(tail: bytes) -> bool:
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(tail.decode()), dict)
    return False


def _check(prompt: Any, completion: Any, label: Any, score: Any, tools: Any, meta: Any) -> None:
    _check_text("prompt", prompt)
    _check_text("completion", completion)
    kinds = f"a {type(completion).__name__} beside a {type(prompt).__name__} as the prompt"
    _require(isinstance(completion, str) == isinstance(prompt, str), "completion", kinds, "two strings or two lists")
    if isinstance(prompt, list):
        asks = bool(prompt) and prompt[-1]["role"] in ("user", "tool")
        _require(asks, "prompt", "no turn to reply to", "messages of which a user's (or a tool's) comes last")
        replies = bool(completion) and completion[0]["role"] == completion[-1]["role"] == "assistant"
        _require(replies, "completion", "not an assistant's", "messages of which an assistant's comes first and last")
        turns = [x for x in completion if x["role"] == "assistant" and not x.get("tool_calls")]
        said = all(x["content"].strip() for x in turns)
    else:
        said = bool(completion.strip())
    _require(said, "completion", "an empty completion", "some text")
    _require(label is not None or score is not None, "label", "neither label nor score", "at least one")
    _require(label is None or isinstance(label, bool), "label", _got(label), "true or false")
    number = isinstance(score, int | float) and not isinstance(score, bool) and abs(score) <= MAX_SCORE
    _require(score is None or number, "score", _got(score), f"a number within ±{MAX_SCORE:,.0f}")
    schemas = isinstance(tools, list) and all(isinstance(x, dict) for x in tools)
    _require(tools is None or schemas, "tools", _got(tools), "a list of tool schemas")
    _require(not tools or isinstance(prompt, list), "tools", "given beside a plain prompt", "a prompt of messages")
    _require(meta is None or isinstance(meta, dict), "meta", _got(meta), "an object")


def _check_text(key: str, text: Any) -> None:
    _require(isinstance(text, str | list), key, _got(text), "a string or a list of messages")
    for i, message in enumerate(text if isinstance(text, list) else []):
        at = f"{key}[{i}]"
        _require(isinstance(message, dict), at, _got(message), "a message {role, content}")
        role, content = message.get("role"), message.get("content")
        _require(role in ROLES, f"{at}.role", _got(role), f"one of {', '.join(ROLES)}")
        fit = isinstance(content, str) or (content is None and message.get("tool_calls"))
        _require(fit, f"{at}.content", _got(content), "a string (or null beside tool_calls)")


def _head(event: str, id: Any, time: Any) -> dict[str, Any]:
    _require(isinstance(id, str) and id, "id", _got(id), "a string that names the completion")
    return {"v": VERSION, "event": event, "id": id, "time": _timestamp(time)}


def _timestamp(value: Any) -> str:
    now = datetime.now(timezone.utc) if value is None else value
    with suppress(ValueError, OverflowError):  # no such day
        if isinstance(now, datetime) and now.tzinfo is not None:
            return now.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if isinstance(now, str) and _UTC.fullmatch(now) and datetime.fromisoformat(now[:19]):
            return now
    raise ValueError(f"time: {_got(value)}; expected a datetime with a zone, or RFC 3339 as 2026-01-31T12:00:00Z")


def _json(key: str, value: object) -> str:
    try:
        line, text = json.dumps(value, allow_nan=False), json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{key}: {error}; expected what JSON can hold") from error
    _require(not _UNFIT.search(text), key, "a null byte or half a surrogate pair", "text")
    return line


def _got(value: object) -> str:
    return f"got {reprlib.repr(value)} ({type(value).__name__})"


def _require(holds: object, key: str, wrong: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{key}: {wrong}; expected {expected}")
