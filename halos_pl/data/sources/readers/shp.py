"""Stanford Human Preferences: pairs of Reddit comments on a post, of which people upvoted one more.

Rows have `history` (the post), `human_ref_A` and `human_ref_B` (comments), `score_A` and `score_B`, and `labels`: 1
where A is preferred, 0 where B is (https://huggingface.co/datasets/stanfordnlp/SHP). As in the KTO paper's code, the
training split has only the pairs of which one score is at least twice the other, and at most five a post, drawn by a
fixed seed; other splits have all. Runs of spaces become one. No comment is known to be a post's best, so SFT imitates
the first one: the first of the post's pairs that has it is marked, else the first pair's A.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halos_pl.data.records import DataError, Origin
from halos_pl.data.sources.readers.convert import assistant, got, mapping, required, single_spaced, text, user
from halos_pl.data.sources.rows import Rows

MIN_RATIO = 2
MAX_PAIRS = 5  # of a post
SEED = 0


@dataclass(frozen=True)
class _Pair:
    history: str
    first: str  # A
    second: str  # B
    prefers_first: bool
    clear: bool

    def row(self, imitated: str | None) -> dict[str, Any]:
        """The pair as messages; `imitated` is the comment that SFT imitates, if it is one of the two."""
        chosen, rejected = (self.first, self.second) if self.prefers_first else (self.second, self.first)
        mark = None if imitated is None else "chosen" if imitated == chosen else "rejected"
        return {
            "prompt": [user(single_spaced(self.history))],
            "chosen": [assistant(single_spaced(chosen))],
            "rejected": [assistant(single_spaced(rejected))],
            "_demonstration": mark,
        }


def read(rows: Rows) -> Rows:
    """The training split."""
    slots: list[tuple[Origin, _Pair | DataError]] = []
    posts: dict[str, list[int]] = {}
    for origin, line in rows:
        pair = _pair(line, origin)
        if isinstance(pair, _Pair):
            if not pair.clear:
                continue
            posts.setdefault(pair.history, []).append(len(slots))
        slots.append((origin, pair))
    imitated: dict[int, str | None] = {}
    for history, places in posts.items():
        pairs = [pair for i in places if isinstance(pair := slots[i][1], _Pair)]
        drawn = _drawn(history, len(places))
        imitated.update({places[i]: None for i in drawn})
        first = next((i for i in drawn if pairs[0].first in (pairs[i].first, pairs[i].second)), None)
        if first is None:
            imitated[places[drawn[0]]] = pairs[drawn[0]].first
        else:
            imitated[places[first]] = pairs[0].first
    for place, (origin, pair) in enumerate(slots):
        if isinstance(pair, DataError):
            yield origin, pair
        elif place in imitated:
            yield origin, pair.row(imitated[place])


def read_held_out(rows: Rows) -> Rows:
    """Any other split: every pair."""
    seen: set[str] = set()
    for origin, line in rows:
        pair = _pair(line, origin)
        if isinstance(pair, DataError):
            yield origin, pair
            continue
        yield origin, pair.row(None if pair.history in seen else pair.first)
        seen.add(pair.history)


def _drawn(history: str, count: int) -> Sequence[int]:
    """Which of a post's pairs are taken: the same whatever other posts there are."""
    if count <= MAX_PAIRS:
        return range(count)
    return sorted(random.Random(f"{SEED} {history}").sample(range(count), MAX_PAIRS))


def _pair(line: object, origin: Origin) -> _Pair | DataError:
    try:
        row = mapping(line, origin)
        history, first, second = (text(row, key, origin) for key in ("history", "human_ref_A", "human_ref_B"))
        scores = [required(row, key, origin) for key in ("score_A", "score_B")]
        if wrong := [x for x in scores if isinstance(x, bool) or not isinstance(x, int | float) or x != x]:
            raise origin.error("score_A and score_B", f"got {got(wrong[0])}", "numbers")
        if isinstance(label := required(row, "labels", origin), bool) or label not in (0, 1):
            raise origin.error("labels", f"got {got(label)}", "1 where A is preferred, 0 where B is")
    except DataError as error:
        return error
    return _Pair(history, first, second, bool(label), _clear(*scores))


def _clear(one: float, other: float) -> bool:
    """Whether the higher score is at least twice the lower one.

    Any score above zero is, of one that is not; of two scores of which none is above zero, neither says that its
    comment is good.
    """
    low, high = min(one, other), max(one, other)
    return high > 0 and high > low and high >= MIN_RATIO * low
