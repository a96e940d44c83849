"""Tokenized once, found again, whoever did it and however often it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from halos_pl.data import prepare as module
from halos_pl.data import tokenization, writers
from halos_pl.data.prepare import Preparation, Prepared
from halos_pl.data.records import DataError, DataWarning
from halos_pl.data.sources import Source
from halos_pl.data.store import Corpus
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.tokenizers import load_tokenizer
from halos_pl.data.views import only_kind

ROWS = 700


def row(i: int) -> dict[str, Any]:
    return {"prompt": f"question {i % 97}", "completion": "word " * (1 + i % 5) + str(i), "label": i % 3 == 0}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(writers, "CHUNK", 10)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(ROWS)), encoding="utf-8")
    return path


@pytest.fixture
def encoder(tiny_model: Path) -> CompletionTokenizer:
    return CompletionTokenizer(load_tokenizer(str(tiny_model)), chat_template="plain")


def contents(found: Prepared) -> list[tuple[Any, ...]]:
    corpus = Corpus(found.blocks)
    return [
        (
            str(corpus.origin(i)),
            corpus.tokens("prompt", i).tolist(),
            corpus.tokens("first", i).tolist(),
            int(corpus.label[i]),
            corpus.keys("prompt")[i].tobytes(),
        )
        for i in range(len(corpus))
    ]


def test_rows_come_in_order_whoever_tokenizes_them(file: Path, encoder: CompletionTokenizer, tmp_path: Path) -> None:
    alone = contents(Preparation(encoder, cache=tmp_path / "a")(Source(str(file))))
    assert [x[0] for x in alone] == [f"{file}:{i + 1}" for i in range(ROWS)]
    direct = [encoder.encode(row(i)["prompt"], row(i)["completion"], origin=None) for i in (0, 63, 64, 699)]  # type: ignore[arg-type]
    for i, ids in zip((0, 63, 64, 699), direct, strict=True):
        assert alone[i][1:3] == (ids.prompt.tolist(), ids.completion.tolist())
    for workers in (2, 3):
        assert (
            contents(Preparation(encoder, cache=tmp_path / str(workers), workers=workers)(Source(str(file)))) == alone
        )


def test_the_second_time_nothing_is_tokenized(
    file: Path, encoder: CompletionTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    first = Preparation(encoder, cache=tmp_path)(Source(str(file)))
    asked: list[int] = []
    real = CompletionTokenizer.encode_records
    monkeypatch.setattr(
        CompletionTokenizer, "encode_records", lambda self, records: asked.append(len(records)) or real(self, records)
    )
    shorter = CompletionTokenizer(load_tokenizer(str(tiny_model)), chat_template="plain", max_length=8)
    assert Preparation(shorter, cache=tmp_path)(Source(str(file))).blocks == first.blocks, "lengths are cut later"
    assert not asked
    for options in ({"chat_template": "chatml"}, {"chat_template": "plain", "eos_token": "<unk>"}):
        other = CompletionTokenizer(load_tokenizer(str(tiny_model)), **options)  # type: ignore[arg-type]
        assert Preparation(other, cache=tmp_path)(Source(str(file))).blocks != first.blocks, options
    asked.clear()
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row(0)) + "\n")
    assert len(contents(Preparation(encoder, cache=tmp_path)(Source(str(file))))) == ROWS + 1
    assert sum(asked) == ROWS + 1


def test_other_ranks_read_what_the_first_one_read(
    file: Path, encoder: CompletionTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Preparation(encoder, cache=tmp_path)(Source(str(file)))
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row(0)) + "\n")  # a service goes on writing
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Preparation(encoder, cache=tmp_path)(Source(str(file))).blocks == first.blocks
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Preparation(encoder, cache=tmp_path)(Source(str(file))).blocks != first.blocks


def test_the_same_rows_of_another_file_keep_their_places(
    file: Path, encoder: CompletionTokenizer, tmp_path: Path
) -> None:
    copy = file.with_name("copy.jsonl")
    copy.write_bytes(file.read_bytes())
    for path in (file, copy):
        found = contents(Preparation(encoder, cache=tmp_path / "cache")(Source(str(path))))
        assert found[0][0] == f"{path}:1"


def test_bad_rows_stop_or_are_skipped_and_named(file: Path, encoder: CompletionTokenizer, tmp_path: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    lines[300] = b'{"prompt": "x", "completion": "</s>y", "label": true}\n'
    lines[301] = b"nonsense\n"
    file.write_bytes(b"".join(lines))
    for workers in (1, 2):
        prepare = Preparation(encoder, cache=tmp_path / str(workers), workers=workers)
        with pytest.raises(DataError) as told:
            prepare(Source(str(file)))
        assert f"{file}:301: completion: the control token" in str(told.value)
        assert f"{file}:302: column 1" in str(told.value)
        skipping = Preparation(encoder, on_bad_row="skip", cache=tmp_path / str(workers))(Source(str(file)))
        assert [(x, y) for x, y, _ in skipping.bad] == [(str(file), 301), (str(file), 302)]
        assert len(contents(skipping)) == ROWS - 2
        with pytest.raises(DataError, match=":301"):
            prepare(Source(str(file)))


def test_ten_bad_rows_end_it(file: Path, encoder: CompletionTokenizer, tmp_path: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"label": false', b'"label": "perhaps"'))
    with pytest.raises(DataError, match="the first 10 bad rows"):
        Preparation(encoder, cache=tmp_path)(Source(str(file)))
    assert len(list(tmp_path.rglob("*.arrow"))) == 1
    assert not list(tmp_path.rglob("complete.json"))


def test_a_damaged_block_is_made_again(file: Path, encoder: CompletionTokenizer, tmp_path: Path) -> None:
    found = Preparation(encoder, cache=tmp_path)(Source(str(file)))
    wanted = contents(found)
    complete = found.blocks[0].parent / "complete.json"
    for harm in (
        lambda: found.blocks[3].write_bytes(found.blocks[3].read_bytes()[:100]),
        found.blocks[5].unlink,
        lambda: complete.with_name("000001.arrow.4711").write_text("left by a process that was killed"),
        complete.unlink,
        lambda: complete.write_text(""),
    ):
        harm()
        assert contents(Preparation(encoder, cache=tmp_path)(Source(str(file)))) == wanted
    assert not list(found.blocks[0].parent.glob("*.arrow.*"))


def test_all_turns_are_rows(encoder: CompletionTokenizer, tmp_path: Path) -> None:
    said = [{"role": role, "content": role} for role in ("user", "assistant") * 3]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": said}) + "\n", encoding="utf-8")
    last = contents(Preparation(encoder, cache=tmp_path)(Source(str(file))))
    every = contents(Preparation(encoder, turns="all", cache=tmp_path)(Source(str(file))))
    assert len(last) == 1
    assert len(every) == 3
    assert every[-1] == last[0]


WORKER = """
    import sys
    from pathlib import Path
    from halos_pl.data import prepare as module
    from halos_pl.data import writers
    from halos_pl.data.prepare import Preparation
    from halos_pl.data.sources import Source
    from halos_pl.data.tokenization import CompletionTokenizer
    from halos_pl.data.tokenizers import load_tokenizer

    module.BLOCK, writers.CHUNK = 64, 10
    file, model, cache, workers = sys.argv[1:]
    encoder = CompletionTokenizer(load_tokenizer(model), chat_template="plain")
    print("begin", flush=True)
    Preparation(encoder, cache=Path(cache), workers=int(workers))(Source(file))
    print("end", flush=True)
"""


def start(file: Path, model: Path, cache: Path, workers: int) -> subprocess.Popen[bytes]:
    code = [sys.executable, "-c", textwrap.dedent(WORKER), str(file), str(model), str(cache), str(workers)]
    process = subprocess.Popen(code, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begin\n"
    return process


def vanishes(group: int) -> bool:
    """No process of the group is left after a while."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def killed(times: int, file: Path, model: Path, cache: Path) -> int:
    """Kill it at random moments; returns how often it was killed before it had come to its end."""
    rng, early = np.random.default_rng(0), 0
    for i in range(times):
        process = start(file, model, cache, 1 + i % 2)
        time.sleep(rng.uniform(0, 0.15))
        early += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert vanishes(process.pid), "its own processes see that and end"
        if i % 10 == 9:  # from the beginning again
            for path in cache.rglob("*.arrow"):
                path.unlink()
            for path in cache.rglob("complete.json"):
                path.unlink()
    return early


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_what_was_killed_goes_on(
    times: int, file: Path, tiny_model: Path, encoder: CompletionTokenizer, tmp_path: Path
) -> None:
    wanted = contents(Preparation(encoder, cache=tmp_path / "quiet")(Source(str(file))))
    early = killed(times, file, tiny_model, tmp_path / "cache")
    assert early, "killed in time at least once"
    assert contents(Preparation(encoder, cache=tmp_path / "cache")(Source(str(file)))) == wanted


def test_two_at_a_time_share_the_work(
    file: Path, tiny_model: Path, encoder: CompletionTokenizer, tmp_path: Path
) -> None:
    both = [start(file, tiny_model, tmp_path / "cache", 1) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert contents(Preparation(encoder, cache=tmp_path / "cache")(Source(str(file)))) == contents(
        Preparation(encoder, cache=tmp_path / "quiet")(Source(str(file)))
    )


def test_limits_and_weights_are_drawn_of_the_same_tokens(
    file: Path, encoder: CompletionTokenizer, tmp_path: Path
) -> None:
    sources = [Source(str(file)), Source(str(file), limit=3), Source(str(file), weight=0.5)]
    found = [Preparation(encoder, cache=tmp_path)(source) for source in sources]
    assert found[0].blocks == found[1].blocks == found[2].blocks
    assert [x.source for x in found] == sources


def test_a_file_that_grows_is_read_once(
    file: Path, encoder: CompletionTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By several processes too, and by training and validation alike."""
    prepare = Preparation(encoder, cache=tmp_path, workers=2)
    real = module.read_rows

    def growing(*arguments: Any, **options: Any) -> Any:
        rows = real(*arguments, **options)
        yield next(rows)
        with file.open("a", encoding="utf-8") as lines:
            lines.write("".join(json.dumps(row(i)) + "\n" for i in range(100)))
        yield from rows

    monkeypatch.setattr(module, "read_rows", growing)
    first = contents(prepare(Source(str(file))))
    assert [x[0] for x in first] == [f"{file}:{i + 1}" for i in range(ROWS)]
    assert contents(prepare(Source(str(file)))) == first


def test_what_was_warned_of_is_warned_of_again(encoder: CompletionTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    huge = row(1) | {"completion": "a" * 1_000_001}
    rows = [row(0) | {"split": "train"}, huge | {"split": "test"}]
    file.write_text("".join(json.dumps(x) + "\n" for x in rows), encoding="utf-8")
    for _ in range(2):
        with pytest.warns(DataWarning) as told:
            Preparation(encoder, cache=tmp_path)(Source(str(file)))
        said = " ".join(str(x.message) for x in told)
        assert "rows of all splits are used together" in said
        assert "1,000,001 characters" in said


def test_a_cache_that_cannot_be_written_is_told(file: Path, encoder: CompletionTokenizer) -> None:
    with pytest.raises(DataError, match=r"data.cache: /proc/nowhere.* cannot be written"):
        Preparation(encoder, cache=Path("/proc/nowhere"))(Source(str(file)))


def test_a_template_that_writes_the_date_is_rendered_anew_each_day(
    file: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    keys = set()
    for day in (1, 2):
        monkeypatch.setattr(tokenization, "date", SimpleNamespace(today=lambda day=day: day))
        for template in ("plain", dated):
            encoder = CompletionTokenizer(load_tokenizer(str(tiny_model)), chat_template=template)
            keys.add(Preparation(encoder, cache=tmp_path)(Source(str(file))).blocks[0].parent.name)
    assert len(keys) == 3


def test_kinds_are_compared_over_blocks(encoder: CompletionTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    pairs = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(64)]
    file.write_text("".join(json.dumps(x) + "\n" for x in [*map(row, range(64)), *pairs]), encoding="utf-8")
    corpus = Corpus(Preparation(encoder, cache=tmp_path)(Source(str(file))).blocks)
    assert corpus.files == [str(file)]
    refusal = only_kind(corpus, np.arange(len(corpus)))
    assert refusal is not None
    assert refusal.records.tolist() == list(range(64, 128))
