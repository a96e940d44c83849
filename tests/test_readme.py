"""The README tells today's truth: its commands parse, its script runs, its tree exists."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halos_pl import halo, objectives
from halos_pl.__main__ import main
from halos_pl.chat.command import parser as chat_options
from halos_pl.estimate.command import parse as estimate_options
from halos_pl.export_command import parser as export_options
from halos_pl.inspect.command import parser as inspect_options

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
    if argv[3] == "data":
        assert inspect_options().parse_args(argv[5:]).data.train
        return
    if argv[3] == "export":
        assert export_options().parse_args(argv[4:]).run
        return
    if argv[3] == "estimate":
        assert estimate_options(argv[4:]).gpus
        return
    if argv[3] == "doctor":
        assert argv[4:] in ([], ["--json"])
        return
    if "runs/mine/config.yaml" in argv:  # what an earlier command leaves
        Path("runs/mine/checkpoints/last.ckpt").mkdir(parents=True)
        Path("runs/mine/checkpoints/last.ckpt/manifest.json").touch()
        Path("runs/mine/config.yaml").write_text("{}")
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
    script, _ = blocks("python")
    assert len([line for line in script.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    for name in ("feedback.jsonl", "held_out.jsonl"):
        Path(name).write_bytes(thumbs_file.read_bytes())
    scope: dict[str, object] = {}
    exec(compile(script.replace("MODEL", str(tiny_model)), "README.md", "exec"), scope)
    assert Path("aligned", "model.safetensors").is_file()


def test_the_objective_of_ones_own_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    _, objective = blocks("python")
    Path("mine.py").write_text(objective)
    argv = ["fit", "--config", "kto.yaml", "--model.objective", "mine.Arctan", "--trainer.fast_dev_run", "true"]
    monkeypatch.setattr(sys, "argv", ["halos_pl", *argv])
    assert main(argv) == 0


def test_the_tables_of_objectives_are_what_the_program_says() -> None:
    assert objectives.markdown() in README
    assert halo.table() in (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")


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


def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / name).read_text())["rows"]
    return [row for row in found if row["status"] == "measured"]


def kernel_lines() -> Iterator[str]:
    found = {(x["implementation"], x["pass"]): x for x in rows("kernels-cpu.json")}
    for name in ("naive", "ours", "torch", "trl"):
        own = [found[name, what] for what in ("forward", "forward+backward", "frozen")]
        cells = [f"{x['ms']['median']:.0f} ms, {x['peak_mib']:.0f} MiB" for x in own]
        yield f"| {name} | {' | '.join(cells)} |"


def numerics_lines() -> Iterator[str]:
    names = {
        "ours": "ours",
        "trl": "TRL 1.16, as installed",
        "liger-semantics": "Liger's rounding",
        "torch": "torch 2.13 `F.linear_cross_entropy`",
    }
    found = {(x["path"], x["perturbation"]): x for x in rows("numerics.json")}
    for path, name in names.items():
        small, large = found[path, 0.002], found[path, 0.02]
        errors = (small["token_rms"], small["logratio_rms"], large["logratio_rms"])
        yield f"| {name} | {' | '.join(f'{x:.1e}' for x in errors)} |"
    spreads = (f"{found['ours', x]['true_logratio_std']:.2f}" for x in (0.002, 0.02))
    yield f"| the log-ratios' own spread | | {' | '.join(spreads)} |"


def test_the_figures_of_the_preparation_are_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    preparation = importlib.import_module("benchmarks.preparation")
    report = json.loads((ROOT / "benchmarks" / "results" / "preparation.json").read_text())
    assert preparation.table(report) in README
    assert preparation.missed(report) == []


def test_the_figures_of_the_kernels_are_what_was_measured() -> None:
    for line in (*kernel_lines(), *numerics_lines()):
        assert line in README
    product = next(x for x in rows("kernels-cpu.json") if x["implementation"] == "torch.mm")
    assert f"takes {product['ms']['median']:.0f} ms" in README
