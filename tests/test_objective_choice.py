"""Another objective brings its own defaults, through the real parser."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from halos_pl.__main__ import main
from halos_pl.module import AlignmentModule
from halos_pl.objective_choice import BEGINNING, own_defaults

OWN = """
import enum, math
from dataclasses import dataclass, field
from halos_pl.losses import DPO

class Kind(enum.Enum):
    one = 1

@dataclass(frozen=True)
class Odd(DPO):
    beta: float = 0.3
    top: float = math.inf
    kind: Kind = Kind.one
    told: float = field(default=1.0, init=False)
"""


@pytest.fixture
def resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What `fit` would run with: the objective's class and arguments."""
    monkeypatch.chdir(tmp_path)
    Path("simpo.yaml").write_text("model: {objective: {class_path: SimPO}}")
    Path("margin.yaml").write_text("model: {objective: {class_path: SimPO, init_args: {gamma: 0.25}}}")
    Path("own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("word.yaml").write_text("model: {objective: SLiC}")

    def run(*argv: str) -> tuple[str, dict[str, Any]]:
        command = ["fit", *argv, "--model.policy", "nano:model", "--data.train", "nano:pairs", "--print_config"]
        monkeypatch.setattr("sys.argv", ["halos_pl", *command])
        with pytest.raises(SystemExit) as end:
            main(command)
        assert not end.value.code
        objective = yaml.safe_load(capsys.readouterr().out)["model"]["objective"]
        return objective["class_path"].rpartition(".")[2], objective["init_args"]

    return run


@pytest.mark.parametrize(
    ("argv", "name", "arguments"),
    [
        ((), "KTO", {"beta": 0.1}),
        (("--model.objective", "SLiC"), "SLiC", {"beta": 1.0}),
        (("--model.objective=SLiC",), "SLiC", {"beta": 1.0}),
        (("--model.objective", "halos_pl.losses.SLiC"), "SLiC", {"beta": 1.0}),
        (("--model.objective", '{"class_path": "SLiC"}'), "SLiC", {"beta": 1.0}),
        (("--config", "simpo.yaml"), "SimPO", {"beta": 2.0, "gamma": 1.0}),
        (("--config=margin.yaml",), "SimPO", {"beta": 2.0, "gamma": 0.25}),
        (("--config", "word.yaml"), "SLiC", {"beta": 1.0}),
        (("--config", "dpo.yaml", "--model.objective", "SimPO"), "SimPO", {"beta": 2.0, "gamma": 1.0}),
        (("--config", "dpo.yaml", "--config", "margin.yaml"), "SimPO", {"beta": 2.0, "gamma": 0.25}),
        (("--config", "dpo.yaml", "--model.objective", "SimPO", "--model.objective.beta", "7"), "SimPO", {"beta": 7}),
        (("--model.objective.beta", "7", "--model.objective", "SimPO"), "SimPO", {"beta": 7}),
        (("--config", "kto.yaml", "--model.objective", "APOZero"), "APOZero", {"reference_point": False, "beta": 0.1}),
        (("--config", "kto.yaml", "--model.objective", "KTO"), "KTO", {"beta": 0.5, "desirable_weight": 4.0}),
        (("--config", "kto.yaml", "--model.objective", "halos_pl.losses.kto.KTO"), "KTO", {"beta": 0.5}),
        (("--config", "kto.yaml", "--model.objective.class_path=SLiC"), "SLiC", {"beta": 1.0}),
        (("--config", "kto.yaml", "--model", "{objective: SLiC}"), "SLiC", {"beta": 1.0}),
        (("--config", "kto.yaml", "--config", '{"model": {"objective": "SLiC"}}'), "SLiC", {"beta": 1.0}),
        (("--model.objective", "own.Odd"), "Odd", {"beta": 0.3, "top": math.inf}),
        (("--model.objective.init_args.beta", "7", "--model.objective", "SimPO"), "SimPO", {"beta": 7}),
        (("--config", "kto.yaml", "--model.objective.beta", "0.2"), "KTO", {"beta": 0.2, "desirable_weight": 4.0}),
    ],
)
def test_arguments(argv: tuple[str, ...], name: str, arguments: dict[str, Any], resolved: Any) -> None:
    found, values = resolved(*argv)
    assert found == name
    assert {key: values[key] for key in arguments} == arguments


def test_what_is_chosen_at_the_beginning_is_the_module_s_default() -> None:
    default = inspect.signature(AlignmentModule).parameters["objective"].default
    assert type(default).__name__ == BEGINNING


@pytest.mark.parametrize(
    "argv",
    [
        ["fit", "--config", "nowhere.yaml"],
        ["fit", "--model.objective", "NoSuchThing"],
        ["fit", "--model.objective", "nowhere.Thing"],
        ["fit", "--model.objective", "..KTO"],
        ["fit", "--model.objective", "broken.Thing"],
        ["fit", "--model.objective", "raises.Thing"],
        ["fit", "--config"],
        ["fit", "--data.train", "x"],
    ],
)
def test_what_the_parser_must_explain_reaches_it_unchanged(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in (("broken.py", "def ("), ("raises.py", "raise RuntimeError")):
        (tmp_path / name).write_text(text)
    assert own_defaults(argv) == argv
