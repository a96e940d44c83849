"""Figure 4: what is drawn is `implied_value`, and names of curves do not lie on each other."""

from __future__ import annotations

import doctest
import importlib
import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from halos_pl.plots.value_functions import LOOKS, draw_value_functions, spread
from halos_pl.value import VALUE_FUNCTIONS, implied_value

NAMES = {look.label: name for name, look in LOOKS.items()}


def curves(axes: Any) -> dict[str, Any]:
    return {NAMES[line.get_label()]: line for line in axes.get_lines() if line.get_label() in NAMES}


def check(axes: Any, beta: float) -> None:
    """Every line of these axes is the function of its name, through the origin."""
    for name, line in curves(axes).items():
        z, v = (torch.as_tensor(x, dtype=torch.float64) for x in line.get_data())
        ends = implied_value(name, torch.cat([z, torch.zeros(1, dtype=torch.float64)]), beta=beta)
        torch.testing.assert_close(v, ends[:-1] - ends[-1], rtol=1e-12, atol=1e-12)
        assert v[z == 0].tolist() == [0]


def test_every_function_has_a_look_of_its_own() -> None:
    assert set(LOOKS) == set(VALUE_FUNCTIONS)
    assert len({look.color for look in LOOKS.values()}) == len({look.label for look in LOOKS.values()}) == len(LOOKS)


def test_the_default_picture() -> None:
    (axes,) = draw_value_functions().axes
    assert set(curves(axes)) == set(VALUE_FUNCTIONS)
    check(axes, 1.0)
    for line in curves(axes).values():
        assert line.get_xdata()[[0, -1]].tolist() == [-4, 4]
    assert axes.get_xlim() == (-4, 4)
    assert "v(z) − v(0)" in axes.get_ylabel()
    assert "reward − reference point" in axes.get_xlabel()
    assert {*NAMES, "← losses", "gains →"} == {text.get_text() for text in axes.texts}


def test_numbers_of_the_default_picture_by_hand() -> None:
    ends = {name: line.get_ydata()[[0, -1]].tolist() for name, line in curves(draw_value_functions().axes[0]).items()}
    assert ends == {
        "rlhf": pytest.approx([-4, 4]),
        "dpo": pytest.approx([math.log(2) - math.log1p(math.exp(4)), math.log(2) - math.log1p(math.exp(-4))]),
        "slic": pytest.approx([-4, 1]),
        "ppo": pytest.approx([-math.log(2), math.log(2)]),
        "kto": pytest.approx([1 / (1 + math.exp(4)) - 0.5, 1 / (1 + math.exp(-4)) - 0.5]),
        "kahneman_tversky": pytest.approx([-2.25 * 4**0.88, 4**0.88]),
    }


def test_a_subset_with_one_panel_a_beta() -> None:
    betas = (0.1, 0.5, 2.0, 5.0)
    figure = draw_value_functions(["kto", "slic"], betas=betas, low=-1.0, high=12.0)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["β = 0.1", "β = 0.5", "β = 2", "β = 5"]
    for axes, beta in zip(figure.axes, betas, strict=True):
        assert set(curves(axes)) == {"kto", "slic"}
        assert axes.get_xlim() == (-1, 12)
        check(axes, beta)
        assert bool(axes.get_ylabel()) == (beta in (0.1, 2.0)), "the left panels"
        assert bool(axes.get_xlabel()) == (beta in (2.0, 5.0)), "the lower panels"


@pytest.mark.parametrize("name", VALUE_FUNCTIONS)
def test_no_curve_leaves_the_picture(name: Any) -> None:
    (axes,) = draw_value_functions([name]).axes
    floor, ceiling = axes.get_ylim()
    assert all(floor < v < ceiling for v in curves(axes)[name].get_ydata())


def test_what_comes_twice_is_drawn_once() -> None:
    figure = draw_value_functions(["kto", "kto"], betas=[1.0, 1.0])
    assert [list(curves(axes)) for axes in figure.axes] == [["kto"]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"names": ["kto", "ipo"]}, "name must be one of rlhf.*got 'ipo'"),
        ({"names": []}, "at least one name"),
        ({"betas": []}, "one beta"),
        ({"betas": [1.0, 0.0]}, r"beta must be a finite number > 0, got 0\.0"),
        ({"low": 0.0}, r"low < 0 < high, got 0\.0 and 4\.0"),
        ({"high": -1.0}, r"low < 0 < high, got -4\.0 and -1\.0"),
        ({"high": math.inf}, "must span 1e-09 to 1e\\+99"),
        ({"low": math.nan}, "must span 1e-09 to 1e\\+99"),
        ({"low": -1e308, "high": 1e308}, "must span 1e-09 to 1e\\+99"),
        ({"low": -1e-300, "high": 1e-300}, "must span 1e-09 to 1e\\+99"),
        ({"betas": range(1, 14)}, "at most 12 betas fit into a picture, got 13"),
        ({"betas": [1e308]}, r"beta 1e\+308: from -4\.0 to 4\.0 the values span inf"),
        ({"betas": [1e-300], "names": ["kto"]}, "beta 1e-300: .* the values span 0"),
    ],
)
def test_bad_input_is_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_value_functions(**kwargs)


@pytest.mark.parametrize(
    "places", [[0.5] * 6, [0.0, 0.0, 1.0, 1.0], [1.0] * 5, [0.1, 0.12, 0.5, 0.55, 0.58, 0.9], [0.5]]
)
def test_names_are_spread_within_the_panel(places: list[float]) -> None:
    gap = 0.08
    spreaded = spread(places, gap)
    assert all(b - a > gap - 1e-12 for a, b in pairwise(spreaded))
    assert gap / 2 - 1e-12 <= spreaded[0]
    assert spreaded[-1] <= 1 - gap / 2 + 1e-12


def test_names_with_room_stay_where_their_curves_end() -> None:
    assert spread([0.1, 0.3, 0.9], 0.08) == pytest.approx([0.1, 0.3, 0.9])


def test_docstring_examples() -> None:
    result = doctest.testmod(importlib.import_module("halos_pl.plots.value_functions"))
    assert result.attempted
    assert not result.failed
