"""The command: views, configurations, exit status, and mistakes told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halos_pl.__main__ import main

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad one"}


def test_rows_choose_how_they_are_read(inspected: Any, write: Any) -> None:
    def kind(*rows: dict[str, Any]) -> tuple[str, str, int]:
        _, facts = inspected(write(*rows))
        return facts["objective"]["name"], facts["kind"], facts["rows"]

    assert kind(PAIR, {**PAIR, "prompt": "q"}) == ("DPO", "pairs", 2)
    assert kind({"prompt": "p", "completion": "c"}) == ("SFT", "demonstrations", 1)
    assert kind({"prompt": "p", "completion": "c", "label": True}, {"prompt": "q", "completion": "d"})[0] == "KTO"
    scored = kind({"prompt": "p", "completion": "c", "score": 1.5}, {"prompt": "q", "completion": "d", "score": -1})
    assert scored == ("PPOOffline", "labelled", 2)


def test_an_objective_that_is_asked_for(inspected: Any, write: Any) -> None:
    path = write(PAIR, {**PAIR, "prompt": "q"})
    _, facts = inspected(path, "--objective", "KTO")
    assert (facts["kind"], facts["classes"]) == ("labelled", {"desirable": 2, "undesirable": 2, "share": 0.5})
    assert facts["objective"] == {"name": "KTO", "inferred": False}
    assert facts["lengths"]["undesirable"]["max"] == 8
    assert inspected(path, "--objective=SFT")[1]["kind"] == "demonstrations"


def test_a_configuration_of_fit(inspected: Any, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """Of the module it takes the objective, the tokenizer and the model's positions; the trainer it leaves alone."""
    config = tmp_path / "own.yaml"
    objective = {"class_path": "KTO", "init_args": {"desirable_weight": 2.5, "beta": 0.5}}
    content = {
        "seed_everything": 3,
        "trainer": {"max_epochs": 3},
        "model": {"objective": objective, "policy": str(tiny_model), "optimizer": {"class_path": "AdamW"}, "warmup": 0},
        "data": {"batch_size": 2},
        "evaluation": {"prompts": "nano:prompts"},
    }
    config.write_text(json.dumps(content), encoding="utf-8")
    _, facts = inspected(rows_file, "--config", str(config), "--data.tokenizer=null")
    assert facts["objective"] == {"name": "KTO", "inferred": False}
    assert facts["weights"]["in_use"]["desirable"] == 2.5
    assert facts["truncation"]["max_length"] == 128  # the model's positions
    assert facts["truncation"]["limited_by_model"]
    assert facts["padding"]["batch_size"] == 2
    assert facts["tokenizer"]["name"] == str(tiny_model)
    assert not facts["tokenizer"]["stand_in"]
    changed = inspected(rows_file, f"--config={config}", "--objective", "BCO", "--data.max_length", "60")[1]
    assert changed["objective"]["name"] == "BCO"
    assert changed["weights"]["in_use"]["desirable"] == 1.0  # BCO's own default
    assert changed["truncation"]["max_length"] == 60


def test_a_configuration_that_ships(inspected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["data", "inspect", "--config", "kto.yaml", "--examples", "0", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert status == 0
    assert facts["weights"]["in_use"]["desirable"] == 4.0
    assert facts["weights"]["in_use"]["inside"]
    assert facts["examples"] == []
    assert facts["warnings"] == []
    assert main(["data", "inspect", "--config", "kto.yaml", "--split-of", "validation", "--json"]) == 0
    held_out = json.loads(capsys.readouterr().out)
    assert held_out["stage"] == "validation"
    assert held_out["sources"][0]["name"] == "nano:thumbs-held-out"


def test_without_a_tokenizer_the_small_one_stands_in(capsys: pytest.CaptureFixture[str], rows_file: Path) -> None:
    assert main(["data", "inspect", "--data.train", str(rows_file)]) == 1
    out = capsys.readouterr().out
    assert "the small tokenizer that ships (nano:model)" in out
    assert "--data.tokenizer FOLDER_OR_HUB_NAME" in out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data.train", "/nowhere/rows.jsonl"], "'/nowhere/rows.jsonl': no such file or folder"),
        ([], "no data to inspect: give --data.train FILE"),
        (["--split-of", "test"], "no data to inspect: give --data.test FILE"),
        (["--data.train", "ROWS", "--objective", "KTOO"], "--objective: no class 'KTOO' there; did you mean 'KTO'?"),
        (["--data.train", "ROWS", "--data.max_lenght", "9"], "unknown key --data.max_lenght; did you mean"),
        (["--data.train", "ROWS", "--config", "CONFIG"], "unknown key 'batch_sizes'; did you mean --data.batch_size?"),
        (["--data.train", "ROWS", "--config", "ktoo.yaml"], "--config: no file 'ktoo.yaml' here"),
        (["--data.train", "ROWS", "--config", "ROWS"], "ROWS"),
        (["--data.train", "ROWS", "--data.tokenizer", "/nowhere"], "no tokenizer could be loaded from '/nowhere'"),
        (["--data.train", "ROWS", "--html", "/nowhere/page.html"], "--html: "),
        (["--data.train", "ROWS", "--objective", "SFT", "--data.sampler", "stratified"], "sampler stratified"),
        (["--data.train", "ROWS", "--objective", "DPO"], "no row can be used"),
        (["--data.train", "ROWS", "--data.max_length", "1"], "max_length is 1"),
    ],
)
def test_mistakes(
    options: list[str], told: str, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text("data:\n  batch_sizes: 3\n", encoding="utf-8")
    names = {"ROWS": str(rows_file), "CONFIG": str(config)}
    assert main(["data", "inspect", *(names.get(x, x) for x in options)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("halos_pl: error: ")
    assert len(captured.err.splitlines()) == 1
    assert names.get(told, told) in captured.err


def test_no_other_command_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspcet"]) == 2
    assert capsys.readouterr().err == "halos_pl: error: data: unknown command 'inspcet'; there is inspect\n"
    assert main(["data"]) == 0
    assert "data inspect" in capsys.readouterr().out


def test_bad_rows_stop_it_where_the_options_say_so(rows_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", "--data.train", str(rows_file), "--data.on_bad_row", "error"]) == 2
    assert f"{rows_file}:11: label: missing" in capsys.readouterr().err


def test_rows_of_another_view_are_bad_rows_too(inspected: Any, write: Any) -> None:
    rows = [{"prompt": f"p{i}", "completion": "c", "label": True} for i in range(12)]
    unlabelled = [{"prompt": f"q{i}", "completion": "c"} for i in range(12)]
    path = write(*rows, *unlabelled)
    status, facts = inspected(path)
    assert status == 1
    assert (facts["rows"], facts["bad_rows"]["rows"]) == (12, 12)
    assert len(facts["bad_rows"]["listed"]) == 10
    assert facts["bad_rows"]["listed"][0].startswith(f"{path}:13: label: missing")


def test_a_page_beside_json(inspected: Any, rows_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    _, facts = inspected(rows_file, "--html", str(page))  # which parses all of stdout
    assert facts["rows"] == 10
    assert page.stat().st_size > 5000
    _, out = inspected(rows_file, "--html", str(page), text=True)
    assert out.splitlines()[-1] == f"page  {page}"
