"""Several sources as one: which rows of each, how often, and which are held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from halos_pl.data.prepare import Prepared
from halos_pl.data.store import Corpus

Index = NDArray[np.int64]


def select(prepared: Sequence[Prepared], counts: Sequence[int], *, seed: int, weighted: bool) -> Index:
    """Records of a corpus that holds `counts[i]` records of source i, one source after the other.

    A source with a `limit` gives so many of its records, with a weight of 2.5 each twice and half of them once more:
    drawn by the seed and the source's name, in their own order. Weights are for training; held-out rows count once.
    """
    parts, start = [], 0
    for one, count in zip(prepared, counts, strict=True):
        order = np.random.default_rng([seed, 3, crc32(one.source.name.encode())]).permutation(count)[: one.source.limit]
        whole, share = divmod(one.source.weight if weighted else 1.0, 1.0)
        some = max(round(share * len(order)), 1 if whole < 1 else 0)
        drawn = [order] * int(whole) + [order[:some]]
        parts.append(start + np.sort(np.concatenate(drawn), kind="stable"))
        start += count
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def held_out(corpus: Corpus, records: Index, share: float) -> NDArray[np.bool_]:
    """Which records belong to the share of prompts that is held out: by the digest of their prompts' beginning alone,
    so that no prompt and no conversation is on both sides, whatever the seed, the order and the rows that come later.
    """
    digest = np.ascontiguousarray(corpus.keys("opening")[records, 8:]).view(np.uint64).reshape(-1)
    return digest < np.uint64(min(int(share * 2.0**64), 2**64 - 1))


def repeats(prompts: Index, completions: Index, label: NDArray[Any]) -> tuple[int, int]:
    """How many rows say again what an earlier one says, and how many completions of one prompt have both labels.

    Args:
        prompts: codes [rows].
        completions: codes [rows].
        label: [rows], 1, 0 or -1 for none.
    """
    text = prompts * (int(completions.max(initial=0)) + 1) + completions
    good, bad = _distinct(text[label == 1]), _distinct(text[label == 0])
    contradicted = int(np.isin(good, bad, assume_unique=True, kind="sort").sum())
    return len(text) - len(_distinct(text * 3 + label)), contradicted


def _distinct(values: Index) -> Index:
    """In order; numpy's own `unique` takes ten times as long for millions."""
    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered
