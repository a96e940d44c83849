"""The mismatched completions y′ of KTO's reference point: for every row, the completion of another prompt."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
Keys = Sequence[Hashable] | Index
MANY = 20_000  # rows
PROBES = 64


def mismatch(prompts: Keys, completions: Keys, *, seed: int) -> tuple[Index, int]:
    """Partner j(i) of every row i: another prompt *and* another completion, so that y′ = y_j(i) never equals y_i.

    A seeded derangement: rows are laid out prompt by prompt in random order and rotated by the size of the largest
    prompt, which lands every row on another prompt; the few partners with an equal completion are then swapped away.
    It is a function of the rows and the seed alone: no rank, batch, worker or epoch enters (KTO paper, section 4.1,
    draws y′ inside the micro-batch instead, which does depend on them).

    Args:
        prompts: a key for each row; equal keys mean the same prompt. An array holds numbers from 0 on, each at its
            first appearance the next one.
        completions: a key for each row; equal keys mean the same completion.
        seed: of the layout and the swaps.

    Returns:
        The partners, int64 [n], and how many rows had to share one because no permutation exists or was found (a
        single prompt that owns more than half of the rows, say). 0 means that every completion is used once.

    Raises:
        ValueError: some row has no completion of another prompt at all; `args[1]` is the row's index.
    """
    n = len(prompts)
    x, y = (keys if isinstance(keys, np.ndarray) else _codes(keys) for keys in (prompts, completions))
    rng = np.random.default_rng([seed, n])
    place = rng.permutation(n)  # random inside a prompt
    rank = rng.permutation(int(x.max()) + 1 if n else 0)  # and between prompts
    layout = place[np.argsort(rank[x[place]], kind="stable")]
    partner = np.empty(n, np.int64)
    partner[layout] = np.roll(layout, -int(np.bincount(x).max(initial=0)))

    def wrong(i: Index) -> NDArray[np.bool_]:
        return (x[i] == x[partner[i]]) | (y[i] == y[partner[i]])

    rows = np.arange(n)
    shared = 0
    for i in rows[wrong(rows)]:
        if not wrong(rows[i : i + 1])[0]:
            continue  # an earlier swap has mended it
        j = partner[i]
        near = rng.integers(n, size=PROBES) if n > MANY else rows  # a few at random, before a look at a million

        def fits(k: Index, i: int = i, j: int = j) -> Index:
            p = partner[k]
            return k[(x[i] != x[p]) & (y[i] != y[p]) & (x[k] != x[j]) & (y[k] != y[j])]

        if (candidates := fits(near)).size or (n > MANY and (candidates := fits(rows)).size):
            k = rng.choice(candidates)
            partner[i], partner[k] = partner[k], j
        elif (candidates := np.flatnonzero((x != x[i]) & (y != y[i]))).size:
            partner[i] = rng.choice(candidates)
            shared += 1
        else:
            raise ValueError("no row has another prompt with another completion", int(i))
    return partner, shared


def _codes(keys: Sequence[Hashable]) -> Index:
    codes: dict[Hashable, int] = {}
    return np.fromiter((codes.setdefault(k, len(codes)) for k in keys), np.int64, len(keys))
