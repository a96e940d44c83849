"""`python -m halos_pl objectives`: the table that README and users read."""

from __future__ import annotations

import re
from typing import Any

import pytest

from halos_pl.__main__ import main
from halos_pl.losses import KTO, OBJECTIVES, APOZero, KTOv1
from halos_pl.objectives import HEADER, cells, markdown

NAMES = [cls.__name__ for cls in OBJECTIVES]


def printed(capsys: Any, *argv: str) -> str:
    assert main(["objectives", *argv]) == 0
    out = capsys.readouterr()
    assert not out.err
    return out.out


def split(line: str) -> list[str]:
    """The cells of a line of Markdown."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_every_objective_is_printed_once_with_its_formula(capsys: Any) -> None:
    out = printed(capsys)
    heads = [line.split()[0] for line in out.splitlines() if line and not line.startswith((" ", "r:", "Choose"))]
    assert heads == NAMES
    for cls in OBJECTIVES:
        formula = f"{cls.__name__:<11} {cls.formula}    ({cls.source})\n"
        assert out.count(formula) == 1
        below = out.split(formula)[1].splitlines()[0].strip()
        assert below == "{1}; reference: {2}; passes {3}".format(*cells(cls()))
    assert all(cls.formula and cls.source for cls in OBJECTIVES)
    assert "--model.objective.help NAME" in out


def test_formulas_name_one_loss_each() -> None:
    assert len({cls.formula for cls in OBJECTIVES}) == len(OBJECTIVES), "none is inherited by mistake"


def test_the_table_is_markdown(capsys: Any) -> None:
    out = printed(capsys, "--markdown")
    assert out == markdown() + "\n"
    header, rule, *lines = map(split, out.splitlines())
    assert tuple(header) == HEADER
    assert rule == ["---"] * len(HEADER)
    assert [line[0] for line in lines] == NAMES
    for cls, line in zip(OBJECTIVES, lines, strict=True):
        assert len(line) == len(HEADER), f"a pipe in {cls.__name__} would be a cell"
        assert line[4] == cls.formula
        assert all(line)


@pytest.mark.parametrize(
    ("name", "feedback", "reference", "passes"),
    [
        ("KTO", "thumbs", "yes, or none", "4: π, π_ref, on y and y′"),
        ("DPO", "pairs", "yes", "2: π, π_ref"),
        ("SFT", "demonstrations", "–", "1: π"),
        ("CSFT", "thumbs", "–", "1: π"),
        ("SimPO", "pairs", "–", "1: π"),
        ("KTOv1", "thumbs, equal halves", "yes", "2: π, π_ref"),
        ("APOZero", "thumbs", "yes", "2: π, π_ref"),
        ("BCO", "thumbs", "yes", "2: π, π_ref"),
        ("PPOOffline", "thumbs", "yes", "2: π, π_ref"),
    ],
)
def test_what_a_line_says(name: str, feedback: str, reference: str, passes: str) -> None:
    (cls,) = (cls for cls in OBJECTIVES if cls.__name__ == name)
    assert cells(cls())[:4] == (name, feedback, reference, passes)


def test_an_instance_is_described_as_it_is_set() -> None:
    assert cells(KTO(reference_point=False))[3] == cells(APOZero())[3] == cells(KTOv1())[3]


def test_other_arguments_are_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        main(["objectives", "--html"])
    assert end.value.code == 2
    assert "--html" in capsys.readouterr().err
