"""How an objective reads records: single labelled completions, preference pairs, or demonstrations.

A view names completions of a corpus by numbers; no text and no token is copied, and one view can become another.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from halos_pl.data.records import DataError, Record, Unpaired
from halos_pl.data.store import Corpus, codes

Index = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Members:
    """Completions of a corpus, and what is known of each. In a view of pairs, rows 2i and 2i + 1 are the chosen and the
    rejected member of pair i.

    Attributes:
        record: int64 [members], of the corpus.
        side: int8 [members]: 0 the first completion of its record, 1 the second.
        label: int8 [members]: 1 desirable, 0 undesirable, -1 without a label.
        score: float64 [members], NaN for none.
        width: 2 for pairs, else 1.
    """

    record: Index
    side: NDArray[np.int8]
    label: NDArray[np.int8]
    score: NDArray[np.float64]
    width: Literal[1, 2] = 1

    def __len__(self) -> int:
        return len(self.record)

    def take(self, which: Index | Bools) -> Members:
        """Some of the members, in this order."""
        return replace(
            self, record=self.record[which], side=self.side[which], label=self.label[which], score=self.score[which]
        )

    def keys(self, corpus: Corpus) -> NDArray[np.uint8]:
        """Digests of the completions, uint8 [members, 16]."""
        first, second = (corpus.keys(name)[self.record] for name in ("first", "second"))
        return np.where(self.side[:, None] == 0, first, second)

    def sizes(self, corpus: Corpus) -> NDArray[np.int64]:
        """Tokens of the completions with EOS, nothing cut, int64 [members]."""
        first, second = (corpus.sizes[name][self.record] for name in ("first", "second"))
        return np.where(self.side == 0, first, second).astype(np.int64)


@dataclass(frozen=True)
class Refusal:
    """Records that a view cannot read, for one reason: what is wrong with which key, and what was expected."""

    records: Index
    key: str
    wrong: str
    expected: str

    def errors(self, corpus: Corpus) -> Iterator[tuple[int, DataError]]:
        """Each record, and what is to be said of it."""
        for record in self.records.tolist():
            yield record, corpus.origin(record).error(self.key, self.wrong, self.expected)


def as_unpaired(
    corpus: Corpus, records: Index, *, members: Literal["both", "one"] = "both", scores: bool = False, seed: int = 0
) -> tuple[Members, list[Refusal]]:
    """Labelled completions: a pair gives its chosen (desirable) and its rejected member, adjacent in this order.

    With `members="one"` a pair gives one of them, by a coin that depends on (seed, the row's number) alone. A
    completion without a label is refused. With `scores` every completion must bring one (a pair has none); without a
    label, what scores above 0 is desirable.
    """
    pair, label, score = corpus.paired[records], corpus.label[records], corpus.score[records]
    none = np.isnan(score)
    if scores:
        expected = "rows of prompt, completion, score"
        refused = [
            Refusal(
                records[pair],
                "score",
                "a preference pair, and this objective learns from a number for each completion",
                expected,
            ),
            Refusal(records[~pair & none], "score", "missing", "a finite number, the completion's reward"),
        ]
        label = np.where((label < 0) & ~none, score > 0, label).astype(np.int8)
        fits = ~pair & ~none
    else:
        missing = ~pair & (label < 0)
        expected = "true or false, which KTO-like objectives learn from, or an objective of demonstrations"
        sft = "--model.objective SFT"
        rewards = "SFT, or of scores, PPOOffline with reward score; or labels by a threshold: --data.train.threshold 0"
        refused = [
            Refusal(records[missing & none], "label", "missing", f"{expected}: {sft}"),
            Refusal(records[missing & ~none], "label", "missing", f"{expected}: {rewards}"),
        ]
        fits = ~missing
    records, pair, label, score = records[fits], pair[fits], label[fits], score[fits]
    both = pair & (members == "both")
    place = np.repeat(np.arange(len(records)), 1 + both)
    second = np.concatenate([[False], place[1:] == place[:-1]]) if len(place) else np.zeros(0, bool)
    if members == "one":
        second = np.zeros(len(records), bool)
        second[pair] = ~_coin(corpus.row[records[pair]], seed)
    labels = np.where(pair[place], ~second, label[place]).astype(np.int8)
    found = Members(records[place], second.astype(np.int8), labels, score[place])
    return found, [x for x in refused if len(x.records)]


def as_paired(corpus: Corpus, records: Index, *, match: bool = False) -> tuple[Members, list[Refusal], int]:
    """Preference pairs, chosen and rejected members side by side.

    A single completion is refused; with `match`, the i-th desirable completion of a prompt is instead preferred to its
    i-th undesirable one.

    Returns:
        The pairs, what is refused, and how many labelled completions found no partner.
    """
    pair = corpus.paired[records]
    given, single = records[pair], records[~pair]
    expected = "prompt+chosen+rejected, which DPO-like objectives need, or an objective of single completions"
    remedy = f"{expected}: --model.objective KTO, or pairs of one prompt's thumbs: --data.pair_labels true"
    refused: list[Refusal] = []
    matched, alone = np.empty((0, 2), np.int64), 0
    if match:
        labelled = corpus.label[single] >= 0
        refused.append(Refusal(single[~labelled], "label", "missing", "true or false, to make pairs of"))
        matched, alone = _matches(corpus, single[labelled])
    else:
        refused.append(Refusal(single, "chosen", "missing", remedy))
    rows = np.concatenate([np.stack([given, given], 1), matched])
    sides = np.concatenate([np.tile([0, 1], (len(given), 1)), np.zeros_like(matched)])
    order = np.argsort(rows[:, 0], kind="stable")
    count = 2 * len(rows)
    labels = np.tile(np.array([1, 0], np.int8), len(rows))
    members = Members(
        rows[order].reshape(-1), sides[order].reshape(-1).astype(np.int8), labels, np.full(count, np.nan), width=2
    )
    return members, [x for x in refused if len(x.records)], alone


def as_demonstrations(corpus: Corpus, records: Index) -> Members:
    """What to imitate: the chosen members of pairs (or what the pair's source says) and all completions but those
    labelled undesirable, or, without a label, scored 0 or less."""
    label, score, which = corpus.label[records], corpus.score[records], corpus.demonstration[records]
    single = (label == 1) | ((label < 0) & ~(score <= 0))
    good = np.where(corpus.paired[records], which >= 0, single)
    side = np.maximum(which[good], 0).astype(np.int8)
    labels = np.where(corpus.paired[records[good]], 1, label[good]).astype(np.int8)
    return Members(records[good], side, labels, score[good])


def each_turn(record: Record) -> list[Record]:
    """A conversation's replies, each as the completion of what was said before it; other records as they are."""
    if not isinstance(record, Unpaired) or isinstance(record.prompt, str):
        return [record]
    turns = [*record.prompt, *record.completion] if not isinstance(record.completion, str) else record.prompt
    last = len(record.prompt)
    earlier = [i for i in range(1, last) if turns[i]["role"] == "assistant"]
    begin = [i for i in earlier if turns[i - 1]["role"] != "assistant"]
    return [
        *(replace(record, prompt=turns[:i], completion=[turns[i]]) for i in begin),
        record,
    ]


def _matches(corpus: Corpus, records: Index) -> tuple[Index, int]:
    """[pairs, 2] records of one prompt, desirable and undesirable, in their order; and how many are left over."""
    prompt, label = codes(corpus.keys("prompt")[records]), corpus.label[records]
    sides = []
    for wanted in (1, 0):
        mine = np.flatnonzero(label == wanted)
        order = mine[np.argsort(prompt[mine], kind="stable")]
        sorted_prompts = prompt[order]
        start = np.searchsorted(sorted_prompts, sorted_prompts)
        sides.append((sorted_prompts, np.arange(len(order)) - start, order))
    (x, i, good), (y, j, bad) = sides
    place = dict(zip(zip(y.tolist(), j.tolist(), strict=True), bad.tolist(), strict=True))
    found = [
        (a, place[key])
        for key, a in zip(zip(x.tolist(), i.tolist(), strict=True), good.tolist(), strict=True)
        if key in place
    ]
    rows = records[np.array(found, np.int64).reshape(-1, 2)]
    keys = corpus.keys("first")
    rows = rows[(keys[rows[:, 0]] != keys[rows[:, 1]]).any(1)]  # a completion with both labels is no pair
    return rows, len(records) - 2 * len(rows)


def _coin(rows: Index, seed: int) -> Bools:
    """Heads or tails of each row, by its number and the seed alone."""
    tosses = (random.Random(f"{seed}:{row}").random() < 0.5 for row in rows.tolist())
    return np.fromiter(tosses, bool, len(rows))


def only_kind(corpus: Corpus, records: Index) -> Refusal | None:
    """The records of another kind than the first one of their file: a file of mixed schemas is a mistake."""
    kind = np.zeros(len(corpus.files), bool)
    files, first = np.unique(corpus.file, return_index=True)
    kind[files] = corpus.paired[first]
    wrong = records[corpus.paired[records] != kind[corpus.file[records]]]
    if not len(wrong):
        return None
    told = "a pair" if corpus.paired[wrong[0]] else "a single completion"
    other = "single completions" if corpus.paired[wrong[0]] else "pairs"
    expected = f"rows of one kind in a file: this one begins with {other}"
    return Refusal(wrong, "chosen" if corpus.paired[wrong[0]] else "completion", told, expected)
