"""The human value functions that losses imply, drawn (KTO report, figure 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from halos_pl.value import VALUE_FUNCTIONS, ValueFunction, implied_value

POINTS = 501
"""On either side of the reference point, which is one of them."""
MOST_PANELS = 12
SPANS = (1e-9, 1e99)
"""Of either axis: float64 and matplotlib's ticks hold these."""
LABEL_HEIGHT = 0.17
"""Inches that a curve's name takes."""


class Look(NamedTuple):
    """How a curve is drawn: colours of Okabe and Ito, and dashes for those that lie on others."""

    label: str
    color: str
    dashes: str | tuple[float, tuple[float, ...]] = "-"
    width: float = 1.8


LOOKS: dict[ValueFunction, Look] = {  # from the bottom up
    "rlhf": Look("RLHF", "#56B4E9", width=4.0),
    "slic": Look("SLiC", "#009E73", (0, (5, 2)), 2.0),
    "ppo": Look("PPO-Clip", "#CC79A7", (0, (1.5, 1.2)), 2.2),
    "kahneman_tversky": Look("Kahneman–Tversky", "#000000"),
    "dpo": Look("DPO", "#D55E00"),
    "kto": Look("KTO", "#0072B2", width=2.4),
}


def draw_value_functions(
    names: Sequence[ValueFunction] = VALUE_FUNCTIONS,
    *,
    betas: Sequence[float] = (1.0,),
    low: float = -4.0,
    high: float = 4.0,
) -> Figure:
    """Draw `implied_value` over reward − reference point, shifted to v(z) − v(0): one curve a name, one panel a beta.

    Each panel has a vertical axis of its own: betas differ by orders of magnitude.

    Args:
        names: Some of `VALUE_FUNCTIONS`; a name that comes twice is drawn once.
        betas: Each finite, > 0; a beta that comes twice is drawn once.
        low: Left end in nats, < 0.
        high: Right end in nats, > 0.

    Returns:
        The figure, not yet written.

    Raises:
        ValueError: on an unknown name, no name, no beta, a number out of range, too many betas, or values
            that no axis holds.
    """
    if not low < 0 < high or not SPANS[0] <= high - low <= SPANS[1]:
        raise ValueError(f"the range must span {SPANS[0]} to {SPANS[1]}, with low < 0 < high, got {low!r} and {high!r}")
    if not names or not betas:
        raise ValueError("at least one name and one beta are needed")
    if len(set(betas)) > MOST_PANELS:
        raise ValueError(f"at most {MOST_PANELS} betas fit into a picture, got {len(set(betas))}")
    left, right = (torch.linspace(0, end, POINTS, dtype=torch.float64) for end in (low, high))
    z = torch.cat([left.flip(0), right[1:]])
    names = [*(x for x in LOOKS if x in names), *(x for x in names if x not in LOOKS)]
    panels = {beta: {name: _shifted(name, z, beta) for name in names} for beta in betas}
    rows = math.ceil(len(panels) / 3)
    columns = math.ceil(len(panels) / rows)
    width, height = (5.6, 4.0) if len(panels) == 1 else (4.3, 3.4)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    for i, (beta, curves) in enumerate(panels.items()):
        values = torch.stack([*curves.values()])
        floor, ceiling = float(values.min()), float(values.max())
        if not SPANS[0] <= ceiling - floor <= SPANS[1]:
            raise ValueError(
                f"beta {beta!r}: from {low!r} to {high!r} the values span {ceiling - floor:g}, not drawable"
            )
        margin = 0.03 * (ceiling - floor)
        axes = figure.add_subplot(rows, columns, i + 1, xlim=(low, high), ylim=(floor - margin, ceiling + margin))
        _dress(axes, f"β = {beta:g}")
        for name, v in curves.items():
            look = LOOKS[name]
            axes.plot(z, v, linestyle=look.dashes, color=look.color, lw=look.width, label=look.label)
        _name_curves(axes, curves, LABEL_HEIGHT / (height - 1))
        if i % columns == 0:
            axes.set_ylabel("human value,  v(z) − v(0)")
        if i + columns >= len(panels):
            axes.set_xlabel("z = reward − reference point  (nats)")
    return figure


def _shifted(name: ValueFunction, z: Tensor, beta: float) -> Tensor:
    return implied_value(name, z, beta=beta) - implied_value(name, z.new_zeros(()), beta=beta)


def _dress(axes: Axes, title: str) -> None:
    """Lines through the reference point instead of a frame, a light grid, and where gains and losses are."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor="0.3")
    axes.grid(color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    axes.axhline(0, color="0.45", lw=0.9, zorder=1)
    axes.axvline(0, color="0.45", lw=0.9, zorder=1)
    axes.set_title(title, loc="left", fontsize="medium", pad=18)
    for text, shift, side in (("← losses", -5, "right"), ("gains →", 5, "left")):
        axes.annotate(
            text,
            (0, 1),
            (shift, 4),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha=side,
            color="0.3",
        )


def _name_curves(axes: Axes, curves: dict[ValueFunction, Tensor], gap: float) -> None:
    """Write each curve's name at its right end, and lead to it where names had to move apart."""
    floor, ceiling = axes.get_ylim()
    names = sorted(curves, key=lambda name: float(curves[name][-1]))
    ends = [(float(curves[name][-1]) - floor) / (ceiling - floor) for name in names]
    for name, end, height in zip(names, ends, spread(ends, gap), strict=True):
        look = LOOKS[name]
        axes.annotate(
            look.label,
            (1, end),
            (1.06, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=look.color,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": look.color,
                "lw": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 1,
            },
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places nearest to these (ascending, least squares) that are a gap apart, half a gap from 0 and 1.

    Example:
        >>> spread([0.25, 0.25, 0.75], 0.125)
        [0.1875, 0.3125, 0.75]
    """
    groups: list[tuple[float, int]] = []  # mean of place − i·gap, members
    for i, place in enumerate(places):
        mean, size = place - i * gap, 1
        while groups and groups[-1][0] > mean:
            before, n = groups.pop()
            mean, size = (before * n + mean * size) / (n + size), n + size
        groups.append((mean, size))
    highest = 1 - (len(places) - 0.5) * gap
    means = [max(min(mean, highest), gap / 2) for mean, size in groups for _ in range(size)]
    return [mean + i * gap for i, mean in enumerate(means)]
