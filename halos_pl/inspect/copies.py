"""Rows that say again what another one says, that contradict one another, or that share their prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from halos_pl.data.dataset import FeedbackDataset

Index = NDArray[np.int64]
Facts = dict[str, Any]
SHOWN = 3  # examples of each finding


def place(dataset: FeedbackDataset, member: int) -> str:
    """FILE:ROW of a completion."""
    return str(dataset.corpus.origin(int(dataset.members.record[member])))


def distinct(dataset: FeedbackDataset) -> Index:
    """Rows, each once: a weight repeats rows of a mixture on purpose."""
    first = slice(None, None, dataset.members.width)  # of a pair, which no other pair has
    keys = 2 * dataset.members.record[first] + dataset.members.side[first]
    return np.sort(np.unique(keys, return_index=True)[1])


def duplicates(dataset: FeedbackDataset) -> Facts:
    """Rows that equal an earlier one: prompt, completion and label; of pairs, prompt and both completions."""
    rows, width = distinct(dataset), dataset.members.width
    first = rows * width
    text = _joint(dataset.prompts[first], dataset.completions[first])
    other = dataset.completions[first + 1] if width == 2 else dataset.members.label[first] + 1
    again, original = _repeated(_joint(text, other))
    return _found(dataset, first, [original, again])


def contradictions(dataset: FeedbackDataset) -> Facts:
    """Completions of one prompt that have both labels; of pairs, those whose reverse is among the earlier ones."""
    rows, width = distinct(dataset), dataset.members.width
    first = rows * width
    prompts, mine = dataset.prompts[first], dataset.completions[first]
    if width == 1:
        text, label = _joint(prompts, mine), dataset.members.label[first]
        good, bad = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
        _, i, j = np.intersect1d(text[good], text[bad], return_indices=True)
        return _found(dataset, first, [good[i], bad[j]])
    other = dataset.completions[first + 1]
    low, high = np.minimum(mine, other), np.maximum(mine, other)
    unordered = _joint(_joint(prompts, low), high)
    ahead, behind = np.flatnonzero(mine < other), np.flatnonzero(mine > other)
    _, i, j = np.intersect1d(unordered[ahead], unordered[behind], return_indices=True)
    return _found(dataset, first, [ahead[i], behind[j]])


def undecided(dataset: FeedbackDataset) -> Facts:
    """Pairs whose two completions are one and the same."""
    rows = distinct(dataset)
    if dataset.members.width == 1:
        return {"rows": 0, "examples": []}
    same = rows[dataset.completions[2 * rows] == dataset.completions[2 * rows + 1]]
    return {"rows": len(same), "examples": [[place(dataset, 2 * int(x))] for x in same[:SHOWN]]}


def prompts(dataset: FeedbackDataset) -> Facts:
    """How rows spread over prompts."""
    rows = dataset.row_prompts
    sizes = np.bincount(np.unique(rows, return_inverse=True)[1])
    largest = np.bincount(rows).argmax()
    member = int(np.flatnonzero(rows == largest)[0]) * dataset.members.width
    return {
        "distinct": len(sizes),
        "mean_rows": len(rows) / len(sizes),
        "max_rows": int(sizes.max()),
        "largest_share": float(sizes.max() / len(rows)),
        "largest_example": place(dataset, member),
    }


def _joint(a: Index, b: Any) -> Index:
    """One small number for each pair of numbers."""
    both = a.astype(np.int64) * (int(np.max(b, initial=0)) + 1) + b
    return np.asarray(np.unique(both, return_inverse=True)[1], np.int64)


def _repeated(codes: Index) -> tuple[Index, Index]:
    """Places of codes that have come before, in their order, and where each came first."""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(codes)))
    return again, first[inverse[again]]


def _found(dataset: FeedbackDataset, members: Index, columns: list[Index]) -> Facts:
    order = np.argsort(columns[-1], kind="stable")[:SHOWN]
    examples = [[place(dataset, int(members[column[i]])) for column in columns] for i in order]
    return {"rows": len(columns[-1]), "examples": examples}
