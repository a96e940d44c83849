"""Files and rows that no one meant: whatever stands there, a DataError says where, or the other rows are as they were.

`pytest -m slow -s tests/data/test_fuzz.py` runs 22,000 cases and prints what came of them. The file is long because the
makers of cases and what is asserted of each belong together: a seed means nothing without both.
"""

from __future__ import annotations

import bz2
import copy
import csv
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halos_pl.batch import DataNeeds
from halos_pl.data import AlignmentData, DataError
from halos_pl.data.builder import DatasetBuilder
from halos_pl.data.prepare import Preparation, Prepared
from halos_pl.data.records import Origin, parse_record
from halos_pl.data.sources import Source, copy_rows, parsed
from halos_pl.data.sources.columns import labelled, renamed
from halos_pl.data.store import Corpus
from halos_pl.data.tokenization import CompletionTokenizer, Encoded
from halos_pl.data.tokenizers import load_tokenizer

SECONDS = 10  # of a case; more is a hang
LONGEST = 1200  # characters of what is said of one row; of one word, a quarter of it
CASES = {"rows": 55, "bytes": 25, "options": 10, "templates": 7, "files": 3}  # of a hundred
VIEWS = ("unpaired", "paired", "sft")
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
TOOLS = (
    "{{ tools|tojson }}{% for m in messages %}{{ m|tojson }}{% endfor %}"
    "{{ '' if add_generation_prompt else eos_token }}"
)
# fmt: off
TEMPLATES = (
    "plain", "chatml", TOOLS, "{{ 1 }}", "{{ none }}", "{% if true %}{% endif %}", "{{ messages }}", "{{ messages[9]",
    "{{ messages[9].content.x }}", "{{ raise_exception('no') }}", "{{ raise_exception(messages|string * 99) }}",
    "{{ '\\ud800' }}" + PLAIN, "{{ '\\0' }}" + PLAIN, PLAIN + "{{ messages|length }}", "{{ eos_token }}" + PLAIN,
    "{% for m in messages[:1] %}{{ m.content }}{% endfor %}", PLAIN + "{{ eos_token * 3 }}", "{{ 1 // 0 }}" + PLAIN,
    "{% for m in messages %}{{ m.role }}{% endfor %}", "{% for m in messages|reverse %}{{ m.content }}{% endfor %}",
    "{{ messages[0].content + 1 }}", "{{ raise_exception('\\n\\x1b[31m') }}", "{{ messages.x() }}", "{{ 9**9**2 }}",
)
RAW = (
    "NaN", "-Infinity", "1e999", "-0", "01", "1" * 400, "1" * 5000, "tru", "",
    "'a'", '{"a":1,"a":2}', '"\x00"', "\x1b",
    json.dumps('{"name":"f","arguments":' + "[" * 3000),
    *(f"{x * n}{y * n}" for n in (3, 200, 700, 3000) for x, y in (("[", "]"), ('{"a":', "}"))),
    f'{{"{"k" * 3000}":1,"{"k" * 3000}":2}}', '"\\ud800"', '{"\\ud800":"a"}', '{"function":{"\\udc00":1}}', '"\\u0000"',
)
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, 1e308, 10**30, "", " ", "\n", "\0", "\ud800", "a\udfff", "x" * 5000,
    [], {}, [[]], [None], {"a": 1}, {"\ud800": "\ud800"}, ["text"], "<|user|>", "</s>", "<s>", "a</s>", "<|im_end|>",
    "é\u0301", [{"type": "text", "text": "a"}], [{"type": "image"}], {"role": "user", "content": "a"},
    "\u202e\x1b\r" * 300,
)
LABELS = (
    "yes", "YES ", " Up", "1.00", "TRUE", "on", "-1", "0.0", "👎🏽", "null", "maybe", "1" * 3000 + "x",
    "n" * 9999, "👍\ufe0f",
)
KEYS = (
    "prompt", "completion", "chosen", "rejected", "messages", "text", "label", "score", "tools", "split", "lable",
    "event",
    "id", "conversations", "kto_tag", "question", "answer", "instruction", "", "\x1b[1m\n" * 99, "k" * 4000, "\ud800",
)
# fmt: on


@dataclass
class Case:
    """A file with what is known of it, and how it is read."""

    kind: str
    name: str = "f.jsonl"
    content: bytes = b""
    make: Callable[[Path], object] | None = None  # makes what is no regular file
    options: dict[str, Any] = field(default_factory=dict)
    template: str = "plain"
    untouched: dict[int, dict[str, Any]] = field(default_factory=dict)  # line -> row that nothing was done to
    lines: bool = False  # JSON lines, as they stand in `content`


# ------------------------------------------------------------------------------------------------ what is given


def words(rng: random.Random) -> str:
    return " ".join(rng.choice(("a", "bc", "déf", "字", "g'h", "9", "🙂")) for _ in range(rng.randint(1, 4)))


def row(rng: random.Random, schema: str) -> dict[str, Any]:
    """A valid one."""
    prompt, one, other = words(rng), " x" + words(rng), " y" + words(rng)
    ask, reply = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": one}]
    call = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    return {
        "thumbs": lambda: {"prompt": prompt, "completion": one, "label": rng.random() < 0.5},
        "scores": lambda: {"prompt": prompt, "completion": one, "score": rng.choice([-1.5, 0, 3])},
        "pairs": lambda: {"prompt": prompt, "chosen": one, "rejected": other},
        "implicit": lambda: {"chosen": prompt + one, "rejected": prompt + other},
        "text": lambda: {"text": prompt},
        "messages": lambda: {"messages": [{"role": "system", "content": "s"}, *ask, *reply, *ask, *reply], "label": 1},
        "tools": lambda: {"prompt": ask, "completion": reply, "tools": [call], "label": "no"},
        "conversational": lambda: {"prompt": ask, "chosen": reply, "rejected": [{**reply[0], "content": other}]},
    }[schema]()  # type: ignore[no-untyped-call]


FOREIGN: dict[str, dict[str, Any]] = {
    "hh": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    "shp": {"history": "a", "human_ref_A": "b", "human_ref_B": "c", "score_A": 9, "score_B": 2, "labels": 1},
    "gsm8k": {"question": "a", "answer": "#### 1,000", "solution": "so $1000.0"},
    "llama-factory": {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "kto_tag": True,
        "tools": "[]",
    },
    "events": {"v": 1, "event": "feedback", "id": "x", "prompt": "a", "completion": "b", "label": True},
    "oasst": {"message_id": "1", "parent_id": None, "role": "prompter", "text": "a", "lang": "en", "rank": 0},
    "ultrachat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}
SCHEMAS = ("thumbs", "scores", "pairs", "implicit", "text", "messages", "tools", "conversational")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value within."""
    for key, x in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(x, (dict, list)):
            yield from places(x)


def mutated(rng: random.Random, given: dict[str, Any]) -> str:
    """Its JSON, with something wrong (or merely odd)."""
    one = copy.deepcopy(given)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        container, key = rng.choice(list(places(one)) or [(one, "prompt")])
        value = container[key] if isinstance(container, list) else container.get(key)
        kind = rng.randrange(9)
        if kind == 0:
            container.pop(key, None) if isinstance(container, dict) else container.pop(key)
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice((f"{key}s", str(key)[1:], str(key).upper(), *KEYS))] = container.pop(key, None)
        elif kind == 2:
            container[key] = f"@RAW{rng.randrange(len(RAW))}@"
        elif kind == 3 and isinstance(value, list):
            rng.shuffle(value)
        elif kind == 4 and isinstance(value, str):
            at = rng.randint(0, len(value))
            container[key] = value[:at] + str(rng.choice([x for x in ODD if isinstance(x, str)])) + value[at:]
        elif kind == 5:
            one["label"] = copy.deepcopy(rng.choice((*LABELS, *ODD)))
        elif kind == 6:
            one[rng.choice(KEYS)] = copy.deepcopy(
                rng.choice([value, rng.choice(ODD), f"@RAW{rng.randrange(len(RAW))}@"])
            )
        elif kind == 7 and isinstance(container, list):
            container.insert(key, copy.deepcopy(rng.choice([value, rng.choice(ODD)])))
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    text = json.dumps(one, ensure_ascii=rng.random() < 0.8)
    if rng.random() < 0.12:
        text = rng.choice(
            [text[:-1], text + text, *[text[:-1] + ',"label":0,"label":1}'] * 3, f"[{text}]", "null", "{}", text[1:]]
        )
    return re.sub(r'"@RAW(\d+)@"', lambda x: RAW[int(x[1])], text)


def rows_case(rng: random.Random) -> Case:
    case, lines, schema = Case("rows", lines=True), [], rng.choice(SCHEMAS)
    for number in range(1, rng.randint(2, 6)):
        given = row(rng, schema if rng.random() < 0.8 else rng.choice(SCHEMAS))
        if rng.random() < 0.5:
            case.untouched[number] = given
            lines.append(json.dumps(given))
        else:
            lines.append(mutated(rng, given))
    case.template = rng.choice(("plain", "plain", "chatml", TOOLS))
    case.content = ("\n".join(lines) + rng.choice(("\n", ""))).encode(errors="surrogatepass")
    return case


def options_case(rng: random.Random) -> Case:
    if rng.random() < 0.4:
        reader = rng.choice(list(FOREIGN))
        rows = [
            FOREIGN[reader] if rng.random() < 0.4 else mutated(rng, FOREIGN[reader]) for _ in range(rng.randint(1, 4))
        ]
        text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in rows)
        auto = rng.random() < 0.2
        return Case("options", content=text.encode(errors="surrogatepass"), options={} if auto else {"reader": reader})
    case = rows_case(rng)
    case.kind = "options"
    options = {
        "threshold": rng.choice([0, 0.5, -1.0, [0, 1], [-2.0, 2.5], [1, 0], float("nan"), float("inf"), [], [1, 2, 3]]),
        "columns": {rng.choice(KEYS[:10]): rng.choice((*KEYS[:18], "nothing")) for _ in range(rng.randint(1, 3))},
        "split": rng.choice(("train", "test", "", "\n", "nothing")),
        "limit": rng.choice([1, 2, 10**9, 0, -1]),
        "reader": rng.choice(
            ("hh", "shp", "oasst", "gsm8k", "events", "llama-factory", "kto-mix", "ultrachat", "nothing")
        ),
    }
    case.options = {key: options[key] for key in rng.sample(list(options), rng.choice((1, 1, 2)))}
    return case


def table(rng: random.Random, form: str) -> bytes:
    """A valid file of a format."""
    schema = rng.choice(SCHEMAS)
    rows = [row(rng, schema) for _ in range(rng.randint(1, 6))]
    if form in (".jsonl", ".json"):
        text = json.dumps(rows) if form == ".json" and rng.random() < 0.6 else "\n".join(map(json.dumps, rows)) + "\n"
        return text.encode()
    if form == ".parquet":
        out = io.BytesIO()
        at = pa.array([rng.choice((0, 2**40, 2**62))] * len(rows), rng.choice((pa.timestamp("us"), pa.duration("s"))))
        whole = pa.Table.from_pylist(rows)
        pq.write_table(
            whole if rng.random() < 0.7 else whole.append_column("at", at),
            out,
            compression=rng.choice(("none", "snappy")),
        )
        return out.getvalue()
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(rows[0]), delimiter="," if form == ".csv" else "\t", lineterminator=rng.choice(("\n", "\r\n"))
    )
    writer.writeheader()
    writer.writerows({k: json.dumps(x) if isinstance(x, list) else x for k, x in one.items()} for one in rows)
    return text.getvalue().encode()


def damaged(rng: random.Random, content: bytes) -> bytes:
    at, to = sorted((rng.randint(0, len(content)), rng.randint(0, len(content))))
    few = bytearray(content)
    for _ in range(rng.choice((1, 2, 8)) if few else 0):
        few[rng.randrange(len(few))] = rng.choice((0, 10, 13, 34, 44, 0xFF, rng.randrange(256)))
    noise = rng.choice((b'"', b"\r", b"\n", b"\0", b",", b"\xff", b"\xef\xbb\xbf", rng.randbytes(9), b"[" * 999))
    text = content.decode(errors="replace")
    ways = [bytes(few)] * 4 + [
        content[:at],
        content[at:],
        content[:at] + content[to:],
        content[:at] + noise + content[at:],
    ]
    ways += [content.replace(b"\n", x) for x in (b"\r", b"\r\n", b"\n\n", b"\n\r")] + [
        b"\xef\xbb\xbf" + content,
        content,
    ]
    ways += [text.encode(x) for x in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig")] + [content * 2, content.rstrip()]
    return rng.choice(ways)


def bytes_case(rng: random.Random) -> Case:
    form, packed = rng.choice((".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet")), rng.choice(("", "", *PACK))
    content = damaged(rng, table(rng, form))
    if packed and form != ".parquet":
        content = PACK[packed](content)
        content = damaged(rng, content) if rng.random() < 0.5 else content
    else:
        packed = ""
    ends = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.zst", ".txt", ".JSONL", "")
    name = "f" + (rng.choice(ends) if rng.random() < 0.1 else form + packed)
    return Case("bytes", name, content, lines=name == "f.jsonl" and not content.startswith(b"\xef"))


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": partial(gzip.compress, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda x: bytes(pa.compress(x, "zstd", asbytes=True)),
}


def templates_case(rng: random.Random) -> Case:
    case = Case("templates", template=rng.choice(TEMPLATES), lines=True)
    rows = [row(rng, rng.choice(("messages", "tools", "conversational", "thumbs"))) for _ in range(rng.randint(1, 4))]
    case.content = "".join((json.dumps(x) if rng.random() < 0.8 else mutated(rng, x)) + "\n" for x in rows).encode(
        errors="surrogatepass"
    )
    return case


def files_case(rng: random.Random) -> Case:
    line = json.dumps(row(rng, "thumbs")) + "\n"
    ways: dict[str, Callable[[Path], object]] = {
        "nothing": lambda x: None,
        "empty": lambda x: x.write_text(""),
        "newlines": lambda x: x.write_text("\n" * 99),
        "spaces": lambda x: x.write_text(" \n\t\r\n"),
        "folder": lambda x: x.mkdir(),
        "folder of folders": lambda x: (x / "a.jsonl").mkdir(parents=True),
        "folder of empty": lambda x: (x.mkdir(), (x / "a.jsonl").write_text(line), (x / f"b{x.suffix}").write_text("")),
        "folder of a pipe": lambda x: (x.mkdir(), os.mkfifo(x / "a.jsonl")),
        "pipe": os.mkfifo,
        "loop": lambda x: x.symlink_to(x),
        "loops": lambda x: (x.symlink_to(x.with_name("g")), x.with_name("g").symlink_to(x)),
        "dangling": lambda x: x.symlink_to("nothing.jsonl"),
        "device": lambda x: x.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/full"))),
        "unreadable": lambda x: (x.write_text(line), x.chmod(0)),
        "unreadable folder": lambda x: (x.mkdir(), (x / "a.jsonl").write_text(line), x.chmod(0)),
        "folder of unreadable": lambda x: (x.mkdir(), (x / "a.jsonl").write_text(line), (x / "a.jsonl").chmod(0)),
    }
    make = ways[rng.choice(list(ways))]
    ends = (".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.zst", ".json.xz", ".txt", "")
    return Case("files", f"f{rng.choice(ends)}", make=make, options={"split": "train"} if rng.random() < 0.1 else {})


MAKERS = {
    "rows": rows_case,
    "bytes": bytes_case,
    "options": options_case,
    "templates": templates_case,
    "files": files_case,
}


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    while True:
        yield MAKERS[rng.choices(list(CASES), list(CASES.values()))[0]](rng)


# ------------------------------------------------------------------------------------------------ what must come of it


class Hang(BaseException):
    """No Exception, which a template's caller would catch."""


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refuse(patch: pytest.MonkeyPatch) -> None:
    """Nobody is denied anything where tests run as root."""

    def denying(method: Any) -> Any:
        def call(self: Path, *args: Any, **kwargs: Any) -> Any:
            if self.exists() and not self.stat().st_mode & 0o777:
                raise PermissionError(13, "Permission denied", str(self))
            return method(self, *args, **kwargs)

        return call

    for name in ("open", "iterdir"):
        patch.setattr(Path, name, denying(getattr(Path, name)))


def check(message: str, file: Path) -> None:
    """One line for each kind of bad row, each of them short and fit for a terminal."""
    assert str(file) in message, f"does not name the file: {message[:300]}"
    for line in re.split(r"\n  (?=/)|\n(?=correct them, )", message):
        said = line.replace(str(file), "FILE")
        assert said.isprintable(), f"not printable: {said[:300]!r}"
        longest = max(map(len, said.split()))
        assert max(len(said), 4 * longest) <= LONGEST, f"{len(said)} characters, a word of {longest}: {said[:300]}"
        assert "Traceback" not in said


def is_strict(line: bytes) -> bool:
    """Whether it is JSON by its standard in UTF-8, without a key twice: not by the library's own reader."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    try:
        json.loads(line.decode(), object_pairs_hook=unique, parse_constant=lambda _: 1 / 0)
    except (ValueError, AssertionError, ZeroDivisionError, RecursionError):
        return False
    return True


class Run:
    """One case, with a cache of its own."""

    def __init__(self, case: Case, folder: Path, encoder: CompletionTokenizer, index: int) -> None:
        self.case, self.folder, self.encoder, self.index = case, folder, encoder, index
        self.file, self.cache = folder / case.name, folder / "cache"
        self.skip = index % 4 == 3

    def outcome(self, model: Path, patch: pytest.MonkeyPatch) -> str:
        case = self.case
        if case.make is None:
            self.file.write_bytes(case.content)
        else:
            case.make(self.file)
            refuse(patch)
        try:
            source = Source(str(self.file), **case.options)
        except ValueError:
            return "options refused"
        first = None if self.index % 8 == 7 else self.prepared(source, "skip" if self.skip else "error")
        if self.index % 8 == 7:  # blocks that a failed run leaves are taken up by the next one
            first = self.prepared(source, "error")
            found = self.prepared(source, "skip")
            if isinstance(found, Prepared) and found.bad:
                assert isinstance(first, DataError)
                assert found.bad[0][2] in str(first), "other errors than those skipped"
            else:
                assert type(first) is type(found)
            first = found
        if self.index % 3 == 0:
            self.viewed(source)
        if self.index % 40 == 0:
            self.through_the_module(model)
        if isinstance(first, DataError):
            return "bad rows" if "bad rows:" in str(first) else "file refused"
        corpus = Corpus(first.blocks)
        self.compared(source, corpus, first)
        return (
            "some rows skipped" if first.bad and len(corpus) else "all rows skipped" if first.bad else "all rows used"
        )

    def prepared(self, source: Source, mode: Any) -> Prepared | DataError:
        try:
            found: Prepared | DataError = Preparation(self.encoder, on_bad_row=mode, cache=self.cache)(source)
        except DataError as error:
            found = error
            check(str(error), self.file)
        names = {x.name for x in self.cache.glob("*/*")}
        assert not {x for x in names if not re.fullmatch(r"lock|\d{6}\.arrow|complete\.json", x)}, f"left over: {names}"
        assert ("complete.json" in names) == isinstance(found, Prepared), f"after {found}: {names}"
        return found

    def viewed(self, source: Source) -> None:
        mode: Any = "skip" if self.skip else "error"
        needs = DataNeeds(VIEWS[self.index % 9 // 3], False, "", 260, 128)
        builder = DatasetBuilder(
            Preparation(self.encoder, on_bad_row=mode, cache=self.cache), needs, self.index % 2 == 0, "both", 0
        )
        try:
            dataset = builder.build([source], training=self.index % 5 > 0)
        except DataError as error:
            check(str(error), self.file)
        else:
            assert all(len(x.prompt) and len(x.completion) for x in dataset.examples())

    def through_the_module(self, model: Path) -> None:
        options: dict[str, Any] = {"on_bad_row": "skip" if self.skip or self.index % 80 else "error"}
        data = AlignmentData(
            [Source(str(self.file), **self.case.options)],
            cache=str(self.cache),
            chat_template=self.case.template,
            **options,
        )
        data.needs = DataNeeds(VIEWS[self.index % 3], False, str(model), 260, 128)
        try:
            data.setup("fit")
        except DataError as error:
            check(str(error), self.file)
            return
        assert sum(len(x.completions.blocks[0]) for x in data.train_dataloader())
        assert data.save_bad_rows(self.folder / "bad.jsonl") == len(set(data.datasets["train"].bad))

    def compared(self, source: Source, corpus: Corpus, prepared: Prepared) -> None:
        file, case = str(self.file), self.case
        for name, number, message in prepared.bad:
            assert name == file or Path(name).parent == self.file
            assert message.startswith(f"{name}:{number}: "), message[:300]
            check(message, self.file)
        got = [(int(corpus.row[i]), *self.record(corpus, i)) for i in range(len(corpus))]
        if prepared.bad and case.make is None and not case.options.get("reader"):
            self.copied(source, [number for _, number, _ in prepared.bad])
        if case.lines and case.options.keys() <= {"columns", "threshold", "limit"} and not _OTHERS.search(case.content):
            good, bad = self.alone(source)
            assert got == good, "rows differ from what they are alone"
            assert [(number, message) for _, number, message in prepared.bad] == bad
            lines = self.case.content.split(b"\n")
            assert all(is_strict(lines[number - 1]) for number, *_ in got), "not UTF-8, or no strict JSON"
        if not case.options and case.template in ("plain", "chatml", TOOLS) and not _OTHERS.search(case.content):
            decode = self.encoder.tokenizer.decode
            rows = {number: tokens for number, *tokens in got}
            for number, given in case.untouched.items():
                assert number in rows or ("tools" in given and case.template != TOOLS), f"row {number} is lost"
                if isinstance(given.get("prompt"), str):
                    whole = [
                        given["prompt"],
                        *(f"{given[x]}</s>" for x in ("completion", "chosen", "rejected") if x in given),
                    ]
                    assert [decode(x) for x in rows[number][:3] if x] == whole

    def record(self, corpus: Corpus, i: int) -> tuple[Any, ...]:
        score = float(corpus.score[i])
        tokens = [corpus.tokens(name, i).tolist() for name in ("prompt", "first", "second")]
        return *tokens, int(corpus.label[i]), None if score != score else score

    def alone(self, source: Source) -> tuple[list[Any], list[Any]]:
        """The rows one by one, with nothing around them."""
        good: list[Any] = []
        bad: list[Any] = []
        for number, line in enumerate(self.case.content.split(b"\n"), 1):
            origin = Origin(str(self.file), number)
            rows: Any = iter([(origin, parsed(line, origin))] if line.strip() else [])
            rows = renamed(rows, source.columns) if source.columns else rows
            for _, one in labelled(rows, *source.bounds) if source.bounds else rows:
                try:
                    if isinstance(one, DataError):
                        raise one
                    record = parse_record(one, origin)
                    (ids,) = self.encoder.encode_records([record])
                    if not isinstance(ids, Encoded):
                        raise ids
                except DataError as error:
                    bad.append((number, str(error)))
                    continue
                label = getattr(record, "desirable", None)
                completions = [*ids.completions, []][:2]
                good.append(
                    (
                        number,
                        ids.prompt,
                        *completions,
                        -1 if label is None else int(label),
                        getattr(record, "score", None),
                    )
                )
        return good, bad

    def copied(self, source: Source, numbers: list[int]) -> None:
        out = io.BytesIO()
        wanted = {(str(self.file), number) for number in numbers}
        assert copy_rows(source, wanted, out) == wanted
        if self.case.lines:
            lines = self.case.content.split(b"\n")
            assert out.getvalue() == b"".join(lines[n - 1] + b"\n" for n in sorted(set(numbers)))
        elif self.case.name in ("f.csv", "f.tsv"):
            assert all(x in self.case.content + b"\n" for x in out.getvalue().splitlines())


_OTHERS = re.compile(rb"kto_tag|conversations|event|question|instruction|Human:")  # another reader may take the file


def fuzz(folder: Path, model: Path, count: int, seed: int) -> tuple[Counter[tuple[str, str]], dict[str, str]]:
    """What came of so many cases, and what should not have, by what it is."""
    outcomes: Counter[tuple[str, str]] = Counter()
    failures: dict[str, str] = {}

    @cache
    def encoder(template: str) -> CompletionTokenizer:
        return CompletionTokenizer(load_tokenizer(str(model), False), chat_template=template, max_length=128)

    for index, case in enumerate(islice(cases(seed), count)):
        place = folder / f"{index}"
        place.mkdir()
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(os, "environ", dict(os.environ))  # a key for each source is kept there
            patch.setattr(os, "fsync", lambda _: None)
            run = Run(case, place, encoder(case.template), index)
            try:
                with limited():
                    outcomes[case.kind, run.outcome(model, patch)] += 1
            except (Exception, Hang) as error:
                outcomes[case.kind, "WRONG"] += 1
                at = error.__traceback__
                while at is not None and at.tb_next is not None:
                    at = at.tb_next
                where = f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}" if at else ""
                what = re.sub(r"[0-9]+", "#", str(error).replace(str(place), ""))[:60]
                name = f"{type(error).__name__} at {where}: {what}"
                failures.setdefault(name, f"seed {seed}, case {index}: {error}\n  {case!r}"[:1500])
        shutil.rmtree(place, ignore_errors=True)
    return outcomes, failures


@pytest.mark.timeout(0)  # the alarm is ours
def test_whatever_stands_there_is_read_or_refused(tiny_model: Path, tmp_path: Path) -> None:
    outcomes, failures = fuzz(tmp_path, tiny_model, 2000, seed=0)
    assert not failures, "\n".join(f"{name}\n  {what}" for name, what in failures.items())
    assert len({kind for kind, _ in outcomes}) == len(CASES)
    assert min(outcomes["rows", x] for x in ("bad rows", "some rows skipped", "all rows used")) > 50, outcomes


@pytest.mark.timeout(0)
@pytest.mark.parametrize("label", ["1" * 100_000 + "x", "n" * 1_000_000, "+." * 100_000])
def test_no_label_takes_long(label: str) -> None:
    with limited(2), pytest.raises(DataError, match=r"f:1: label: got .{,80}; expected true or false"):
        parse_record({"prompt": "a", "completion": "b", "label": label}, Origin("f", 1))


@pytest.mark.parametrize("option", ["threshold", "weight"])
def test_numbers_beyond_floats_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        Source("f.jsonl", **{option: 10**400})  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_great_many(seed: int, tiny_model: Path, tmp_path: Path) -> None:
    outcomes, failures = fuzz(tmp_path, tiny_model, 2200, seed)
    print(f"seed {seed}:", *(f"\n  {kind:10} {what:20} {n:6,}" for (kind, what), n in sorted(outcomes.items())))
    assert not failures, "\n".join(f"{name}\n  {what}" for name, what in failures.items())
