"""Units in a row, cut into micro-batches: their sizes, their number, their order by length."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]


def alike(lengths: Index, window: int) -> Index:
    """The order by length within windows, falling and rising in turn: neighbours across windows are alike too."""
    number, span = np.arange(len(lengths)) // window, int(lengths.max(initial=0)) + 1
    return np.argsort(number * span + np.where(number % 2, lengths, span - 1 - lengths), kind="stable")


def sizes(units: int, cap: int, world: int) -> Index:
    """Units of each micro-batch; where no spread gives all ranks as many, one each."""
    full, rest = divmod(units, world * cap)
    if not rest:
        return np.full(full * world, cap)
    if rest < world:
        if not full or cap == 1:
            return np.ones(units, dtype=np.int64)
        full, rest = full - 1, rest + world * cap
    last = world if rest <= world * cap else 2 * world
    return np.concatenate([np.full(full * world, cap), rest // last + (np.arange(last) < rest % last)])


def merged(bounds: Index, count: int) -> Index:
    """Micro-batches at the end joined, two and two, until there are `count` fewer."""
    return np.delete(bounds, np.arange(-2 * count, 0, 2))


def halved(bounds: Index, offsets: Index, goal: int) -> Index:
    """Halves the micro-batches of the most rows until there are `goal`, as far as units can be parted."""
    while (need := goal - len(bounds) + 1) > 0:
        units, rows = np.diff(bounds), np.diff(offsets[bounds])
        able = np.flatnonzero((units > 1) & (2 * rows > rows[units > 1].max(initial=0)))
        if not len(able):
            break
        chosen = able[np.argsort(-rows[able], kind="stable")[:need]]
        bounds = np.sort(np.concatenate([bounds, bounds[chosen] + units[chosen] // 2]))
    return bounds
