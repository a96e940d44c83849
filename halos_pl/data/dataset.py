"""Records of a source, in the view of an objective: tokenized, paired with their y′, and accounted for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from halos_pl.batch import DataNeeds, View
from halos_pl.data.collate import Item
from halos_pl.data.pairing import mismatch
from halos_pl.data.records import (
    BadRows,
    DataError,
    DataWarning,
    OnBadRow,
    Paired,
    Record,
    Unpaired,
)
from halos_pl.data.sources import load_records
from halos_pl.data.tokenization import CompletionTokenizer, Example
from halos_pl.data.views import as_demonstrations, as_paired, as_unpaired

Row = tuple[Example, ...]
"""One example, or the chosen and the rejected member of a pair."""


class FeedbackDataset(Dataset[Item]):
    """Rows of one view; with partners, each member brings the y′ of the reference point."""

    def __init__(self, rows: Sequence[Row], partners: NDArray[np.int64] | None = None, report: str = "") -> None:
        self.rows = rows
        self.members = [example for row in rows for example in row]
        self.partners = partners  # [members] indices into members
        self.report = report

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        row = self.rows[index]
        if self.partners is None:
            return Item(row)
        width = len(row)
        partners = self.partners[index * width : (index + 1) * width]
        return Item(row, tuple(self.members[j].completion for j in partners))

    @property
    def labels(self) -> NDArray[np.bool_]:
        """[rows] bool, of unpaired rows."""
        return np.array([bool(row[0].desirable) for row in self.rows])

    @property
    def paired(self) -> bool:
        return len(self.rows[0]) == 2


@dataclass(frozen=True)
class DatasetBuilder:
    """How sources become a dataset.

    Args:
        encoder: tokenizes.
        needs: of the objective.
        pair_all: give every row a y′ from the whole dataset.
        unpair: for unpaired objectives: both members of a pair, or one.
        on_bad_row: stop at malformed rows, or go on without them.
        seed: of y′, members, rows to keep and permuted labels.
    """

    encoder: CompletionTokenizer
    needs: DataNeeds
    pair_all: bool
    unpair: Literal["both", "one"]
    on_bad_row: OnBadRow
    seed: int

    def build(
        self,
        source: str | list[str],
        split: str | None,
        *,
        training: bool = False,
        labelled: bool = True,
        keep: tuple[float, float] = (1.0, 1.0),
        shuffle_labels: bool = False,
    ) -> FeedbackDataset:
        """Read, tokenize and pair.

        Args:
            source: as `load_records` takes it.
            split: likewise.
            training: otherwise pairs stay together for an unpaired objective too, where it has no control.
            labelled: whether a single completion must have a label (and a score, where the objective reads it).
            keep: shares of the desirable and of the undesirable completions to take.
            shuffle_labels: permute labels, or swap half of the pairs, of what is kept: the control experiment.

        Raises:
            DataError: bad rows (unless skipped), rows of another view, or no y′ for some row.
        """
        loaded = load_records(source, split, on_bad_row=self.on_bad_row)
        bad = BadRows(self.on_bad_row)
        records = self._in_view(loaded.records, training, labelled, bad)
        bad.finish()
        if not records:
            raise DataError(f"{source}: no row can be used; the first: {bad.messages[0]}")
        kept = ""
        if keep != (1.0, 1.0):
            records, kept = _share(records, keep, self.seed)
        if shuffle_labels:
            records = _with_shuffled_labels(records, self.seed)
        paired = isinstance(records[0], Paired)
        members = as_unpaired(records, seed=self.seed) if paired else [x for x in records if isinstance(x, Unpaired)]
        encoded = self.encoder.examples(members, on_bad_row=self.on_bad_row)
        rows = _whole_rows(encoded.examples, 2 if paired else 1)
        if not rows:
            raise DataError(f"{source}: no row can be used; the first: {encoded.bad[0]}")
        partners = self._partners([x for row in rows for x in row]) if self.pair_all else None
        skipped = "".join(f"\n  skipped {message}" for message in [*loaded.bad, *bad.messages, *encoded.bad])
        dataset = FeedbackDataset(rows, partners)
        surplus = _surplus(dataset, training) if self.needs.equal_halves and labelled and not paired else ""
        dataset.report = f"{_count(rows, self.needs.view)}{kept}{surplus}; {encoded.truncation}{skipped}"
        return dataset

    def _in_view(self, records: Sequence[Record], training: bool, labelled: bool, bad: BadRows) -> Sequence[Record]:
        view = self.needs.view
        if view == "sft":
            demonstrations = as_demonstrations(records)
            if not demonstrations:
                raise DataError(
                    f"{records[0].origin.file}: all completions are labelled undesirable: nothing to imitate"
                )
            return demonstrations
        if not labelled and not any(isinstance(x, Paired) for x in records):
            return records
        scores, together = self.needs.scores and labelled, self.needs.control is None
        if view == "unpaired" and not (training or scores) and together and all(isinstance(x, Paired) for x in records):
            return records
        fitting: list[Record] = []
        for record in records:
            with bad.caught():
                if view == "paired":
                    fitting += as_paired([record])
                else:
                    members = self.unpair if training else "both"
                    fitting += as_unpaired([record], members=members, scores=scores, seed=self.seed)
        if training and view == "unpaired":
            _warn_of_one_class([x for x in fitting if isinstance(x, Unpaired)])
        return fitting

    def _partners(self, members: Sequence[Example]) -> NDArray[np.int64]:
        try:
            partners, shared = mismatch(
                [x.prompt_key for x in members], [x.completion_key for x in members], seed=self.seed
            )
        except ValueError as error:
            raise DataError(
                f"{members[error.args[1]].origin}: no other row has another prompt with another completion, so there "
                "is no y′ to estimate KTO's reference point on; give data with several prompts, or go without the "
                "reference point: --model.objective.reference_point false"
            ) from None
        if shared:
            warnings.warn(
                f"{shared} of {len(members)} rows share their y′ with another row: one prompt has most of the rows",
                DataWarning,
                stacklevel=2,
            )
        return partners


def _share(records: Sequence[Record], keep: tuple[float, float], seed: int) -> tuple[list[Record], str]:
    """The rows that come first in a permutation of all, so many of each class, in their own order; and a note."""
    place = np.random.default_rng([seed, 2]).permutation(len(records))
    desirable = np.array([isinstance(x, Unpaired) and bool(x.desirable) for x in records])
    taken, notes = np.zeros(len(records), bool), []
    for name, share, member in (("desirable", keep[0], desirable), ("undesirable", keep[1], ~desirable)):
        rows = np.flatnonzero(member)
        chosen = rows[np.argsort(place[rows])][: max(1, round(share * len(rows)))]
        taken[chosen] = True
        notes.append(f"{len(chosen)} of {len(rows)} {name}")
    return [x for x, mine in zip(records, taken, strict=True) if mine], f"; kept {' and '.join(notes)} rows"


def _surplus(dataset: FeedbackDataset, training: bool) -> str:
    """What equal halves leave out of held-out rows, as a note; training shows other rows each epoch."""
    up = int(dataset.labels.sum())
    size, down = len(dataset), len(dataset) - up
    if not up or not down:
        side = "desirable" if up else "undesirable"
        raise DataError(
            f"{dataset.rows[0][0].origin.file}: all {size} rows are {side}; this objective needs as many of both "
            "classes in every micro-batch: give rows of the other class too"
        )
    if training or up == down:
        return ""
    side = "desirable" if up > down else "undesirable"
    return f"; {abs(up - down)} of {max(up, down)} {side} rows are left out, so that halves are equal"


def _with_shuffled_labels(records: Sequence[Record], seed: int) -> list[Record]:
    rng = np.random.default_rng([seed, 1])
    if isinstance(records[0], Paired):
        swap = rng.permutation(len(records)) < len(records) // 2
        return [
            replace(x, chosen=x.rejected, rejected=x.chosen) if isinstance(x, Paired) and flip else x
            for x, flip in zip(records, swap, strict=True)
        ]
    order = rng.permutation(len(records))
    own = [x for x in records if isinstance(x, Unpaired)]
    return [replace(x, desirable=own[k].desirable, score=own[k].score) for x, k in zip(own, order, strict=True)]


def _whole_rows(members: Sequence[Example | None], width: int) -> list[Row]:
    """Members side by side; a pair that lost one as a bad row is left out whole."""
    rows = (members[i : i + width] for i in range(0, len(members), width))
    return [tuple(x for x in row if x is not None) for row in rows if None not in row]


def _warn_of_one_class(records: Sequence[Unpaired]) -> None:
    if len({record.desirable for record in records}) == 1:
        side = "desirable" if records[0].desirable else "undesirable"
        warnings.warn(
            f"{records[0].origin.file}: all {len(records)} rows are {side}: the loss can only push one way",
            DataWarning,
            stacklevel=2,
        )


def _count(rows: Sequence[Row], view: View) -> str:
    if len(rows[0]) == 2:
        return f"{len(rows)} pairs"
    if view == "sft":
        return f"{len(rows)} demonstrations"
    return f"{len(rows)} examples, {sum(bool(row[0].desirable) for row in rows)} of them desirable"
