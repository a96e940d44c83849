"""How an objective reads records: single labelled completions, preference pairs, or demonstrations."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from halos_pl.data.records import Paired, Record, Unpaired


def as_unpaired(
    records: Iterable[Record], *, members: Literal["both", "one"] = "both", scores: bool = False, seed: int
) -> list[Unpaired]:
    """Labelled completions: a pair gives its chosen (desirable) and its rejected member, adjacent in this order.

    With `members="one"` a pair gives one of them, by a coin that depends on (seed, the row's number) alone.
    A completion without a label raises DataError. With `scores` every completion must bring one (a pair has none);
    without a label, what scores above 0 is desirable.
    """
    unpaired: list[Unpaired] = []
    for record in records:
        if scores:
            unpaired.append(_scored(record))
        elif isinstance(record, Paired):
            coin = random.Random(f"{seed}:{record.origin.row}").random() < 0.5
            unpaired += map(record.member, (True, False) if members == "both" else (coin,))
        elif record.desirable is None:
            expected = "true or false, which KTO-like objectives learn from, or an objective of demonstrations"
            remedy = (
                "--model.objective SFT" if record.score is None else "SFT, or of scores, PPOOffline with reward score"
            )
            raise record.origin.error("label", "missing", f"{expected}: {remedy}")
        else:
            unpaired.append(record)
    return unpaired


def _scored(record: Record) -> Unpaired:
    if isinstance(record, Paired):
        wrong = "a preference pair, and this objective learns from a number for each completion"
        raise record.origin.error("score", wrong, "rows of prompt, completion, score")
    if record.score is None:
        raise record.origin.error("score", "missing", "a finite number, the completion's reward")
    return record if record.desirable is not None else replace(record, desirable=record.score > 0)


def as_paired(records: Iterable[Record]) -> list[Paired]:
    """Preference pairs; a single completion among them raises DataError."""
    pairs: list[Paired] = []
    for record in records:
        if isinstance(record, Unpaired):
            expected = "prompt+chosen+rejected, which DPO-like objectives need, or an objective of single completions"
            raise record.origin.error("chosen", "missing", f"{expected}: --model.objective KTO")
        pairs.append(record)
    return pairs


def as_demonstrations(records: Iterable[Record]) -> list[Unpaired]:
    """What to imitate: the chosen members of pairs and all completions but those labelled undesirable, or, without a
    label, scored 0 or less."""
    members = (record.member(True) if isinstance(record, Paired) else record for record in records)
    return [x for x in members if x.desirable or (x.desirable is None and (x.score is None or x.score > 0))]
