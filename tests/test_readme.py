"""The README tells today's truth: its commands parse, its script runs, its tree exists."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from halos_pl.__main__ import main
from halos_pl.chat.command import parser as chat_options

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)


COMMANDS = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
OURS = [line for line in COMMANDS if line.startswith("python -m halos_pl")]


@pytest.mark.parametrize("line", OURS, ids=range(len(OURS)))
def test_commands_parse(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(line)
    if argv[3] == "chat":
        assert chat_options().parse_args(argv[4:]).folder
        return
    if argv[3] == "doctor":
        assert argv[4:] in ([], ["--json"])
        return
    if "runs/mine/config.yaml" in argv:  # what an earlier command leaves
        Path("runs/mine/checkpoints").mkdir(parents=True)
        Path("runs/mine/config.yaml").write_text("{}")
        torch.save({}, "runs/mine/checkpoints/last.ckpt")
    monkeypatch.setattr(sys, "argv", [*shlex.split(line)[2:], "--print_config"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code


def test_every_command_is_known() -> None:
    """What the other lines do is what .ci/run does, with the same words."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("-q ", "")
    for line in set(COMMANDS) - set(OURS):
        assert line in ci, f"{line!r} is run by nothing"


def test_the_script_runs(tiny_model: Path, thumbs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = blocks("python")
    assert len([line for line in script.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    for name in ("feedback.jsonl", "held_out.jsonl"):
        Path(name).write_bytes(thumbs_file.read_bytes())
    scope: dict[str, object] = {}
    exec(compile(script.replace("MODEL", str(tiny_model)), "README.md", "exec"), scope)
    assert Path("aligned", "model.safetensors").is_file()


def test_the_tree_exists() -> None:
    tree = README.split("## Where is what")[1].split("```")[1].strip("\n")
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = "" if not line.startswith(" ") else folder
        assert (ROOT / folder / name).exists(), f"{folder}{name} is in the README's tree only"
        if not line.startswith(" "):
            folder = name


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_no_figure_is_missing() -> None:
    assert not re.findall(r"^[A-Z_]{4,}$", README, flags=re.M)


def test_the_table_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    quickstart = importlib.import_module("benchmarks.quickstart")
    assert quickstart.table(quickstart.load(ROOT / "benchmarks" / "results" / "quickstart.json")) in README
