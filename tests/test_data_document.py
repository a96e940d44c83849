"""docs/data.md tells today's truth: its sources are sources, its options are options, its script runs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml

from halos_pl.data import AlignmentData
from halos_pl.data.sources import Source, as_sources, load_records
from halos_pl.data.sources.readers import READERS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.M | re.S)
    return str(found)


def test_the_sources_are_sources() -> None:
    data = yaml.safe_load(block("yaml"))["data"]
    sources = as_sources([x if isinstance(x, str) else Source(**x) for x in data.pop("train")], None)
    assert [x.reader for x in sources] == ["auto", "hh", "shp", "auto"]
    assert AlignmentData(**data, train="feedback.jsonl").validation_share == 0.05


def test_the_options_are_options() -> None:
    named = set(re.findall(r"--data\.([a-z_]+)", TEXT))
    assert named > {"train", "on_bad_row", "max_tokens"}
    assert named <= set(inspect.signature(AlignmentData).parameters)
    keys = re.findall(r"^\| (`[a-z_`, ]+`) \|", TEXT.split("| key | meaning |")[1].split("\n\n")[0], flags=re.M)
    assert set(re.findall("[a-z]+", " ".join(keys))) == set(Source.__dataclass_fields__)


def test_the_readers_are_all_of_them() -> None:
    table = TEXT.split("| reader | reads |")[1].split("\n\n")[0]
    first_cells = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([^`]+)`", first_cells)) == set(READERS)


def test_the_log_is_what_training_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = block("python")
    exec(compile(script.replace("retract(", "kept = (lambda *_: None)("), "data.md", "exec"), {})
    (record,) = load_records(Source("feedback.jsonl", reader="events")).records
    assert (record.prompt, record.completion, record.desirable) == ("2+2=", " 4", True)  # type: ignore[union-attr]
    Path("feedback.jsonl").unlink()
    exec(compile(script, "data.md", "exec"), {})
    with pytest.raises(ValueError, match="nothing to learn"):
        load_records(Source("feedback.jsonl", reader="events"))
