"""A source on the command line or in a config is a name: nothing opens the file before the readers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halos_pl.cli import HalosCLI, UsageError, run
from halos_pl.data.sources import Source

ROW = {"prompt": "a", "completion": "b", "label": True}
FILES = {
    "array.json": json.dumps([ROW] * 3),
    "one.jsonl": json.dumps(ROW),
    "thumbs.csv": "prompt,completion,label\na,b,true\n",
    "thumbs.tsv": "prompt\tcompletion\tlabel\na\tb\ttrue\n",
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "evil.jsonl": json.dumps({"path": "another.jsonl", "limit": 5}),
    "source.yaml.csv": "reader: hh",
}
BASE = ["fit", "--config", "recipes/kto.yaml", "--model.policy", "nano:model"]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Source]]:
    """What the data module was given, in place of reading it."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_text(content)
    found: dict[str, list[Source]] = {}

    def stop(self: Any) -> None:
        found.update(self.datamodule.sources)
        raise UsageError("seen")

    monkeypatch.setattr(HalosCLI, "_read_data", stop)
    return found


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["command line", "config"])
def test_a_name_stays_a_name(name: str, how: str, sources: dict[str, list[Source]]) -> None:
    if how == "config":
        Path("own.yaml").write_text(f"data:\n  train: {name}\n  validation: {name}\n  test: [{name}]\n")
        argv = ["--config", "own.yaml"]
    else:
        argv = ["--data.train", name, "--data.validation", name, "--data.test", f"[{name}]"]
    assert run([*BASE, *argv]) == 2
    assert [sources[part] for part in ("train", "validation", "test")] == [[Source(name)]] * 3


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--data.train", '{"reader": "hh", "limt": 5}'], "'limt' is no key of a source (did you mean 'limit'?)"),
        (["--data.train", '{"reader": "shpp"}'], "a source of data: reader: 'shpp' (did you mean 'shp'?)"),
        (["--data.train.reader", "shpp"], "a source of data: reader: 'shpp' (did you mean 'shp'?)"),
        (["--data.train.limt", "5"], "unknown key 'limt'; did you mean --data.test.limit or --data.train.limit or"),
        (
            ["--data.train.path", "a.csv", "--data.train.weight", "0"],
            "a source of data: weight: 0.0; expected a number",
        ),
    ],
)
def test_mistakes_in_a_source(
    argv: list[str], says: str, sources: dict[str, list[Source]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*BASE, *argv]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in told
    assert not sources


def test_the_last_of_two_counts_and_is_told(
    sources: dict[str, list[Source]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*BASE, "--data.train", "a.jsonl", "--data.train", "b.jsonl"]) == 2
    assert sources["train"] == [Source("b.jsonl")]
    assert "note: --data.train is given twice, and the last one counts; several sources are" in capsys.readouterr().out
