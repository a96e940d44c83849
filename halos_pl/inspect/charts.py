"""Histograms as SVG: small, without script, in the colours of the page around them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

WIDTH, HEIGHT, FOOT = 320, 120, 16
Facts = Mapping[str, Any]


def histogram(parts: Mapping[str, Facts], *, limit: int | None = None) -> str:
    """One distribution, or two mirrored at a common axis: the first upwards, the second downwards, each in shares.

    Args:
        parts: name → begin, width, counts, and whether the last bar holds longer ones too; all with the same bars.
        limit: a length to mark, where it lies within the picture.
    """
    first = next(iter(parts.values()))
    bars, begin, step = len(first["counts"]), first["begin"], first["width"]
    end = begin + bars * step
    axis = HEIGHT / len(parts)
    drawn: list[str] = []
    most = max((count / sum(x["counts"]) for x in parts.values() for count in x["counts"]), default=0)
    for way, (name, part) in zip((-1, 1), parts.items(), strict=False):
        total = sum(part["counts"])
        for i, count in enumerate(part["counts"]):
            tall = (axis - 4) * count / total / most
            top = axis - tall if way < 0 else axis
            x, wide = i * WIDTH / bars, WIDTH / bars
            what = f"{name}: {begin + i * step:,} to {begin + (i + 1) * step - 1:,} tokens: {count:,} of {total:,}"
            if i == bars - 1:
                what = f"{name}: {begin + i * step:,} tokens{' and more' * part['more']}: {count:,} of {total:,}"
            drawn.append(
                f'<rect class="bar {escape(name)}" x="{x:.1f}" y="{top:.1f}" width="{max(wide - 1, 0.8):.1f}" '
                f'height="{tall:.1f}"><title>{escape(what)}</title></rect>'
            )
    drawn.append(f'<line class="axis" x1="0" x2="{WIDTH}" y1="{axis:.1f}" y2="{axis:.1f}"/>')
    if limit is not None and begin <= limit < end:
        x = (limit - begin) * WIDTH / (end - begin)
        drawn.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT}"/>')
    middle = begin + bars // 2 * step
    last = f"{end - 1:,}{'+' * first['more']}"
    for x, anchor, value in ((0, "start", f"{begin:,}"), (WIDTH / 2, "middle", f"{middle:,}"), (WIDTH, "end", last)):
        drawn.append(f'<text x="{x:.0f}" y="{HEIGHT + FOOT - 3}" text-anchor="{anchor}">{value}</text>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT + FOOT}"'
    names = " and ".join(parts)
    return f'<svg {size} role="img" aria-label="lengths of {escape(names)} in tokens">{"".join(drawn)}</svg>'
