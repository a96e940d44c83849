"""The curves of a run that was killed: each row once. Truth: rows by hand."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from halos_pl.curves import Curves, before


def log(curves: Curves, *steps: int, name: str = "train/loss") -> None:
    for step in steps:
        curves.log_metrics({name: step / 2, "epoch": 0}, step)


def rows(curves: Curves) -> list[str]:
    return [
        f"{x['step']} " + " ".join(name for name, value in x.items() if "/" in name and value) for x in curves.rows()
    ]


def test_what_was_logged_after_the_checkpoint_counts_no_more(tmp_path: Path) -> None:
    log(Curves(tmp_path), 1, 3, 5, 7)
    again = Curves(tmp_path, before(4, 2))
    assert len(again.rows()) == 4, "until something is logged"
    log(again, 5)
    assert rows(again) == ["1 train/loss", "3 train/loss", "5 train/loss"]


def test_the_closing_row_goes_and_the_validations_stay(tmp_path: Path) -> None:
    first = Curves(tmp_path)
    log(first, 1, 3, 4)
    log(first, 4, name="val/loss")
    again = Curves(tmp_path, before(5, 2))
    log(again, 5)
    assert rows(again) == ["1 train/loss", "3 train/loss", "4 val/loss", "5 train/loss"]
    all_of_them = Curves(tmp_path, before(inf, 2))
    log(all_of_them, 7)
    assert len(rows(all_of_them)) == 5


@pytest.mark.parametrize("cut", range(2, 9))
def test_a_row_that_was_cut_is_no_row(cut: int, tmp_path: Path) -> None:
    """`0,123,61.5`: cut at any place, also where step 1 or 12 would stand."""
    log(Curves(tmp_path), 3, 123)
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    again = Curves(tmp_path, before(200, 1))
    assert rows(again) == ["3 train/loss"]
    log(again, 123)
    assert rows(again) == ["3 train/loss", "123 train/loss"]
