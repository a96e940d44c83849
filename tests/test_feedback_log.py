import contextlib
import doctest
import errno
import fcntl
import json
import os
import random
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from halos_pl import feedback_log
from halos_pl.data import records
from halos_pl.data.records import Origin, parse_record
from halos_pl.data.sources import events
from halos_pl.feedback_log import append, retract, snapshot_size

ROOT = Path(__file__).resolve().parents[1]
CHAT = [{"role": "user", "content": "2+2?"}]
REPLY = [{"role": "assistant", "content": "4"}]
WRITER = """
import functools, sys
from halos_pl import feedback_log
feedback_log._json = functools.cache(feedback_log._json)  # so that nearly all its time goes to writing
path, size = sys.argv[1], int(sys.argv[2])
while True:
    print(feedback_log.append(path, prompt="p", completion="x" * size, label=True, fsync=False), flush=True)
"""
CROWD = """
import sys, threading
from halos_pl.feedback_log import append
path, name, threads, events = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def write(thread):
    for i in range(events):
        size = 100_000 if i % 5 == 0 else 10
        append(path, id=f"{name}-{thread}-{i}", prompt="p\\n", completion=name * size, label=True, fsync=i % 10 == 1)
workers = [threading.Thread(target=write, args=(i,)) for i in range(threads)]
[x.start() for x in workers]
[x.join() for x in workers]
"""


def script(code, *arguments, **options):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, **options)


def lines(path):
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def ids(path):
    return [x["id"] for x in lines(path)]


def one(path, **options):
    return append(path, **{"prompt": "p", "completion": "c", "label": True, **options})


@pytest.fixture
def log(tmp_path):
    return tmp_path / "feedback.jsonl"


def test_a_line_has_the_keys_of_the_specification(log):
    name = append(log, prompt="p", completion="c", label=False)
    tools = [{"type": "function", "function": {"name": "add"}}]
    given = {"prompt": CHAT, "completion": REPLY, "score": 1, "tools": tools, "meta": {"user": 7}}
    assert append(log, **given, id="a", time="2026-01-02T03:04:05.6Z") == "a"
    retract(log, "a")
    first, second, third = lines(log)
    assert list(first) == ["v", "event", "id", "time", "prompt", "completion", "label"]
    assert (first["v"], first["event"], first["id"], first["label"]) == (1, "feedback", name, False)
    assert re.fullmatch("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", name)
    now = datetime.fromisoformat(first["time"].replace("Z", "+00:00"))
    assert abs(datetime.now(timezone.utc) - now) < timedelta(minutes=1)
    assert second == {"v": 1, "event": "feedback", "id": "a", "time": "2026-01-02T03:04:05.6Z", **given}
    assert list(third) == ["v", "event", "id", "time"]
    assert (third["event"], third["id"]) == ("retraction", "a")


def test_a_time_of_another_zone_becomes_utc(log):
    one(log, time=datetime(2026, 1, 1, 1, 30, tzinfo=timezone(timedelta(hours=2))))
    assert lines(log)[0]["time"] == "2025-12-31T23:30:00.000Z"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"label": None}, "label: neither label nor score"),
        ({"label": 1}, "label: got 1 (int)"),
        ({"label": "true"}, "label: got 'true' (str)"),
        ({"score": float("nan")}, "score: got nan"),
        ({"score": float("inf")}, "score: got inf"),
        ({"score": True}, "score: got True"),
        ({"score": -1e7}, "score: got -10000000.0"),
        ({"score": "1"}, "score: got '1'"),
        ({"id": ""}, "id: got ''"),
        ({"id": 7}, "id: got 7"),
        ({"id": "\ud800"}, "id: a null byte or half a surrogate pair"),
        ({"time": "yesterday"}, "time: got 'yesterday'"),
        ({"time": "2026-13-01T00:00:00Z"}, "time: got '2026-13-01"),
        ({"time": "2026-01-01T00:00:00+02:00"}, "time: got"),
        ({"time": datetime(2026, 1, 1)}, "time: got"),
        ({"time": 7}, "time: got 7"),
        ({"prompt": None}, "prompt: got None"),
        ({"prompt": b"p"}, "prompt: got b'p'"),
        ({"prompt": "a\ud800"}, "prompt: a null byte or half a surrogate pair"),
        ({"prompt": "\0"}, "prompt: a null byte or half"),
        ({"completion": " "}, "completion: an empty completion"),
        ({"completion": "\udfff"}, "completion: a null byte or half a surrogate pair"),
        ({"completion": REPLY}, "completion: a list beside a str as the prompt"),
        ({"tools": [{}]}, "tools: given beside a plain prompt"),
        ({"prompt": CHAT, "completion": REPLY, "tools": "add"}, "tools: got 'add'"),
        ({"prompt": CHAT, "completion": REPLY, "tools": [1]}, "tools: got [1]"),
        ({"prompt": [], "completion": REPLY}, "prompt: no turn to reply to"),
        ({"prompt": REPLY, "completion": REPLY}, "prompt: no turn to reply to"),
        ({"prompt": [{"role": "system", "content": "s"}], "completion": REPLY}, "prompt: no turn to reply to"),
        ({"prompt": CHAT, "completion": REPLY + CHAT}, "completion: not an assistant's"),
        ({"prompt": CHAT, "completion": []}, "completion: not an assistant's"),
        ({"prompt": CHAT, "completion": CHAT}, "completion: not an assistant's"),
        ({"prompt": CHAT, "completion": [{"role": "assistant", "content": ""}]}, "completion: an empty"),
        ({"prompt": CHAT, "completion": [{"role": "assistant", "content": None}]}, "completion[0].content: got None"),
        ({"prompt": ["hi"], "completion": REPLY}, "prompt[0]: got 'hi'"),
        ({"prompt": [{"role": "USER", "content": "x"}], "completion": REPLY}, "prompt[0].role: got 'USER'"),
        ({"prompt": [{"content": "x"}], "completion": REPLY}, "prompt[0].role: got None"),
        ({"prompt": [{"role": "user", "content": "\ud800"}], "completion": REPLY}, "prompt: a null byte or half"),
        ({"prompt": [{**CHAT[0], "at": datetime(2026, 1, 1)}], "completion": REPLY}, "prompt: Object of type datetime"),
        ({"prompt": 'a"\\\0'}, "prompt: a null byte or half"),
        ({"prompt": [{"role": "user", "content": "a", "\0": 1}], "completion": REPLY}, "prompt: a null byte or half"),
        ({"meta": 3}, "meta: got 3"),
        ({"meta": {"x": float("nan")}}, "meta: Out of range float"),
        ({"meta": {"x": {1}}}, "meta: Object of type set"),
        ({"meta": {"\ud800": 1}}, "meta: a null byte or half a surrogate pair"),
    ],
)
def test_nothing_is_written_of_an_unfit_event(log, given, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        one(log, **given)
    assert "; expected" in str(error.value)
    assert not log.exists()


def test_objects_that_hold_themselves_are_refused(log):
    meta: dict = {}
    meta["meta"] = meta
    with pytest.raises(ValueError, match="meta: Circular"):
        one(log, meta=meta)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="meta: "):
        one(log, meta={"x": deep})
    assert not log.exists()


@pytest.mark.parametrize("name", ["", "\0", None, 7])
def test_a_retraction_needs_an_id(log, name):
    with pytest.raises(ValueError, match="id: "):
        retract(log, name)
    assert not log.exists()


CALL = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {}}}]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"label": None, "score": -3},
        {"score": 1e6},
        {"prompt": ""},
        {"prompt": "\\u0000 \\ud800 \\\\u0000 \x01\ue000"},
        {"prompt": CHAT, "completion": REPLY, "tools": []},
        {"prompt": CHAT, "completion": [{"role": "assistant", "content": None, "tool_calls": CALL}], "tools": [{}]},
        {"prompt": CHAT, "completion": [{"role": "assistant", "tool_calls": CALL}, *CHAT, *REPLY]},
        {
            "prompt": [{"role": x, "content": "", "tool_calls": CALL} for x in records.ROLES],
            "completion": REPLY,
        },
        {"prompt": "line\nend\r\u2028\u2029\x85 naïve 你好 🙂", "completion": '"\\\t\x0b'},
    ],
)
def test_what_can_be_written_can_be_trained_on(log, given):
    if given.pop(
        "bad", False
    ):  # developer, system, user, assistant, tool: some order of which the last is no assistant
        given["prompt"].sort(key=lambda x: x["role"])
        given["prompt"].append(CHAT[0])
    name = one(log, **given)
    (row,) = lines(log)
    assert row["id"] == name
    assert len(log.read_text(encoding="utf-8").splitlines()) == 1
    ((origin, row),) = events.read(iter([(Origin(str(log), 1), row)]))
    record = parse_record(row, origin)
    expected = {"prompt": "p", "completion": "c", "label": True, **given}
    if isinstance(expected["prompt"], str):
        assert (record.prompt, record.completion) == (expected["prompt"], expected["completion"])
    assert (record.desirable, record.score) == (expected["label"], expected.get("score"))


def test_the_rules_are_those_of_training():
    assert feedback_log.ROLES == records.ROLES
    assert feedback_log.MAX_SCORE == records.MAX_SCORE


@pytest.mark.parametrize("cut", [*range(1, 40), -1, -2, -3])
def test_a_torn_tail_is_moved_aside_wherever_it_was_torn(log, cut):
    one(log, id="a")
    whole = log.read_bytes()
    one(log, id="b", completion="é" * 50)
    line = log.read_bytes()[len(whole) :]
    log.write_bytes(whole + line[:cut])
    assert snapshot_size(log) == len(whole) + (len(line) - 1 if cut == -1 else 0)
    one(log, id="c")
    torn = log.with_name("feedback.jsonl.torn")
    assert ids(log) == (["a", "b", "c"] if cut == -1 else ["a", "c"])
    assert log.read_bytes().startswith(whole)
    assert (torn.read_bytes() if torn.exists() else b"") == (b"" if cut == -1 else line[:cut] + b"\n")


def test_torn_tails_gather(log):
    torn = log.with_name("feedback.jsonl.torn")
    one(log)
    for tail in (b"1", b'{"v": 1, "ev', b'{"v"' + b"x" * 300_000, b"\0" * 5000, b'{"\xff'):
        with log.open("ab") as file:
            file.write(tail)
        one(log)
    assert [x["event"] for x in lines(log)] == ["feedback"] * 6
    assert torn.read_bytes() == b'1\n{"v": 1, "ev\n{"v"' + b"x" * 300_000 + b"\n" + b"\0" * 5000 + b'\n{"\xff\n'


def test_the_torn_file_is_as_private_as_the_log(log):
    one(log)
    log.chmod(0o600)
    with log.open("ab") as file:
        file.write(b"{")
    one(log)
    assert stat.S_IMODE(log.with_name("feedback.jsonl.torn").stat().st_mode) == 0o600


def test_a_last_line_without_newline_is_kept(log):
    log.write_text('{"event": "retraction", "id": "a"}\n{"event": "retraction", "id": "b"}', encoding="utf-8")
    assert snapshot_size(log) == log.stat().st_size
    one(log, id="c")
    assert ids(log) == ["a", "b", "c"]
    assert not log.with_name("feedback.jsonl.torn").exists()


@pytest.mark.parametrize("content", [b'[{"a": 1}]', b"PK\3\4 weights\nmore", b"prompt,label\n1,2\n"])
def test_a_file_of_another_kind_is_left_alone(log, content):
    log.write_bytes(content)
    with pytest.raises(ValueError, match=r"feedback.jsonl: no feedback log, .*; expected one JSON object a line"):
        one(log)
    assert log.read_bytes() == content


@pytest.mark.parametrize("where", ["log", "torn", "newline"])
def test_a_full_disk_leaves_the_log_whole(log, monkeypatch, where):
    one(log, id="a")
    tail = {"log": b"", "torn": b'{"v": 1, "pro', "newline": b'{"event": "retraction", "id": "x"}'}[where]
    before = log.read_bytes() + tail
    log.write_bytes(before)
    write, calls = os.write, []

    def full(fd, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, bytes(data)[:7])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        one(log, id="b")
    assert log.read_bytes() == before
    assert log.with_name("feedback.jsonl.torn").exists() == (where == "torn")
    monkeypatch.undo()
    one(log, id="c")
    assert ids(log) == (["a", "x", "c"] if where == "newline" else ["a", "c"])
    if where == "torn":
        assert log.with_name("feedback.jsonl.torn").read_bytes() == tail + b"\n"


def test_a_write_of_nothing_is_no_endless_loop(log, monkeypatch):
    monkeypatch.setattr(os, "write", lambda fd, data: 0)
    with pytest.raises(OSError, match="short write"):
        one(log)
    assert log.read_bytes() == b""


def test_a_file_size_limit_leaves_the_log_whole(log):
    """The kernel's own short write."""
    text = """
import resource, sys
from halos_pl.feedback_log import append
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
done = 0
try:
    while True:
        append(sys.argv[1], prompt="p", completion="x" * 8000, label=True)
        done += 1
except OSError as error:
    print(done, error.errno)
"""
    out, _ = script(text, log, stdout=subprocess.PIPE, text=True).communicate(timeout=60)
    assert out.split() == ["6", str(errno.EFBIG)]
    assert len(lines(log)) == 6


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_an_event_that_was_not_made_durable_is_taken_back(log, monkeypatch, failure):
    one(log, id="a")

    def broken(fd):
        raise failure

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(type(failure)):
        one(log, id="b")
    assert ids(log) == ["a"]


def test_durable_unless_told_otherwise(log, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    one(log, fsync=False)
    retract(log, "a", fsync=False)
    assert synced == []
    retract(log, "a")
    assert synced == [str(log)]
    log.unlink()
    one(log)
    assert synced[1:] == [str(log), str(log.parent)]  # a new file's name is durable too


def test_folders_missing_folders_and_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    cases = [(tmp_path, IsADirectoryError), (tmp_path / "a" / "b", FileNotFoundError), (tmp_path / "pipe", OSError)]
    for path, error in cases:
        with pytest.raises(error):
            one(path)
        with pytest.raises(error):
            snapshot_size(path)
    assert not (tmp_path / "a").exists()
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OSError, match="no regular file"):
            one(path)


def test_a_read_only_file_is_refused_and_can_be_read():
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "feedback.jsonl")
        one(log)
        before = log.read_bytes()
        os.chmod(folder, 0o755)
        log.chmod(0o444)
        root = os.geteuid() == 0
        try:
            if root:  # may write anything
                os.seteuid(65534)
            with pytest.raises(PermissionError):
                one(log)
            assert snapshot_size(log) == len(before)
        finally:
            if root:
                os.seteuid(0)
        assert log.read_bytes() == before


def test_without_locks_nothing_is_written_and_reading_goes_on(log, monkeypatch):
    one(log)

    def unsupported(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    size = log.stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", unsupported)
        with pytest.raises(OSError, match="No locks available"):
            one(log)
        assert snapshot_size(log) == size
    monkeypatch.setattr(feedback_log, "fcntl", None)
    with pytest.raises(OSError, match="no file locks on this platform"):
        one(log)
    assert snapshot_size(log) == log.stat().st_size == size


def test_everyone_waits_for_the_lock(log):
    one(log)
    size = log.stat().st_size
    with log.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert snapshot_size(log) == size  # readers do not exclude each other
        writer = threading.Thread(target=one, args=(log,))
        writer.start()
        writer.join(0.2)
        assert writer.is_alive()
        assert log.stat().st_size == size
        fcntl.flock(other, fcntl.LOCK_UN)
        writer.join(10)
        assert log.stat().st_size > size
        fcntl.flock(other, fcntl.LOCK_EX)
        seen = []
        reader = threading.Thread(target=lambda: seen.append(snapshot_size(log)))
        reader.start()
        reader.join(0.2)
        assert seen == []
    reader.join(10)
    assert seen == [log.stat().st_size]


def test_a_child_forked_in_mid_append_keeps_no_lock(log, monkeypatch):
    """It inherits the open file, and with it a lock that is not explicitly given back."""
    children, fsync = [], os.fsync

    def fork(fd):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        children.append(child)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fork)
    one(log)
    monkeypatch.undo()
    try:
        writer = threading.Thread(target=one, args=(log,), daemon=True)
        writer.start()
        writer.join(5)
        assert not writer.is_alive()
    finally:
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)


@pytest.mark.parametrize("recreated", [True, False])
def test_a_log_rotated_away_while_a_writer_waits(log, recreated):
    one(log, id="a")
    with log.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer = threading.Thread(target=one, args=(log,), kwargs={"id": "b"})
        writer.start()
        writer.join(0.2)
        log.rename(log.with_name("old.jsonl"))
        if recreated:
            log.touch()
    writer.join(10)
    assert ids(log.with_name("old.jsonl")) == ["a"]
    assert ids(log) == ["b"]


def test_snapshots_of_an_open_file_leave_its_position(log):
    one(log)
    one(log)
    with log.open("ab") as file:
        file.write(b"{")
    with log.open("rb") as file:
        size = snapshot_size(file.fileno())
        assert size == log.stat().st_size - 1
        assert len(file.read(size).splitlines()) == 2
    log.write_bytes(b"")
    assert snapshot_size(log) == 0
    log.write_bytes(b"{" * 1000)
    assert snapshot_size(log) == 0


def test_processes_and_threads_lose_nothing(log):
    writers = [script(CROWD, log, name, 4, 50) for name in "abcd"]
    seen = set()
    while any(x.poll() is None for x in writers):
        if log.exists():
            with log.open("rb") as file:
                data = file.read(snapshot_size(file.fileno()))
            assert data.endswith(b"\n") or not data
            if data:
                json.loads(data[data.rfind(b"\n", 0, -1) + 1 :])
                seen.add(len(data))
        time.sleep(0.01)
    assert [x.wait() for x in writers] == [0] * 4
    rows = lines(log)
    assert {x["id"] for x in rows} == {f"{name}-{t}-{i}" for name in "abcd" for t in range(4) for i in range(50)}
    assert len(rows) == 800
    assert all(len(x["completion"]) in (10, 100_000) for x in rows)
    assert len(seen) > 5
    assert not log.with_name("feedback.jsonl.torn").exists()


def test_killed_writers_take_nothing_with_them(tmp_path):
    rng, size = random.Random(0), 1_000_000
    for kill in range(50):
        log = tmp_path / f"{kill}.jsonl"
        with script(WRITER, log, size, stdout=subprocess.PIPE, text=True) as writer:
            acknowledged = [writer.stdout.readline()]  # it is up
            moment = rng.randrange(8 * size)  # mostly in mid-write: about every third kill leaves a torn line
            while log.stat().st_size < moment and writer.poll() is None:
                pass
            writer.kill()
            acknowledged += writer.stdout.readlines()
        own = one(log, fsync=False)
        names = ids(log)
        complete = [x.strip() for x in acknowledged if x.endswith("\n")]
        assert complete
        assert names[: len(complete)] == complete
        assert len(names) - len(complete) in (1, 2)  # one more may be written and not yet acknowledged
        assert names[-1] == own
        log.unlink()
        with contextlib.suppress(FileNotFoundError):
            tail = log.with_name(log.name + ".torn")
            assert tail.read_bytes().startswith(b'{"v": 1')
            tail.unlink()


def test_a_service_imports_it_without_torch():
    heavy = ["torch", "lightning", "numpy", "transformers", "halos_pl.data", "jsonargparse", "yaml"]
    text = f"import sys, halos_pl.feedback_log; print([x for x in {heavy} if x in sys.modules])"
    out, _ = script(text, stdout=subprocess.PIPE, text=True).communicate(timeout=60)
    assert out.strip() == "[]"


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = doctest.testmod(feedback_log)
    assert result.attempted > 3
    assert result.failed == 0
    (log,) = tmp_path.glob("*/feedback.jsonl")
    assert [x["event"] for x in lines(log)] == ["feedback", "retraction"]


def test_a_file_that_is_always_another_is_refused(log, monkeypatch):
    """A file system that names a file anew at every look."""
    monkeypatch.setattr(os.path, "samestat", lambda a, b: False)
    with pytest.raises(OSError, match="replaced again and again"):
        one(log)
