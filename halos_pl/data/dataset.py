"""Records of a source, in the view of an objective: tokenized, paired with their y′, and accounted for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from halos_pl.batch import View
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


@dataclass(frozen=True)
class DatasetBuilder:
    """How sources become a dataset.

    Args:
        encoder: tokenizes.
        view: of the objective.
        pair_all: give every row a y′ from the whole dataset.
        unpair: for unpaired objectives: both members of a pair, or one.
        on_bad_row: stop at malformed rows, or go on without them.
        seed: of y′, members and permuted labels.
    """

    encoder: CompletionTokenizer
    view: View
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
        shuffle_labels: bool = False,
    ) -> FeedbackDataset:
        """Read, tokenize and pair.

        Args:
            source: as `load_records` takes it.
            split: likewise.
            training: otherwise pairs stay together for an unpaired objective too.
            labelled: whether a single completion must have a label.
            shuffle_labels: permute labels, or swap half of the pairs: the control experiment.

        Raises:
            DataError: bad rows (unless skipped), rows of another view, or no y′ for some row.
        """
        loaded = load_records(source, split, on_bad_row=self.on_bad_row)
        bad = BadRows(self.on_bad_row)
        records = self._in_view(loaded.records, training, labelled, bad)
        bad.finish()
        if not records:
            raise DataError(f"{source}: no row can be used; the first: {bad.messages[0]}")
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
        report = f"{_count(rows, self.view)}; {encoded.truncation}{skipped}"
        return FeedbackDataset(rows, partners, report)

    def _in_view(self, records: Sequence[Record], training: bool, labelled: bool, bad: BadRows) -> Sequence[Record]:
        if self.view == "sft":
            demonstrations = as_demonstrations(records)
            if not demonstrations:
                raise DataError(
                    f"{records[0].origin.file}: all completions are labelled undesirable: nothing to imitate"
                )
            return demonstrations
        if not labelled and not any(isinstance(x, Paired) for x in records):
            return records
        if self.view == "unpaired" and not training and all(isinstance(x, Paired) for x in records):
            return records
        fitting: list[Record] = []
        for record in records:
            with bad.caught():
                if self.view == "paired":
                    fitting += as_paired([record])
                else:
                    fitting += as_unpaired([record], members=self.unpair, seed=self.seed)
        if training and self.view == "unpaired":
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


def _with_shuffled_labels(records: Sequence[Record], seed: int) -> list[Record]:
    rng = np.random.default_rng([seed, 1])
    if isinstance(records[0], Paired):
        swap = rng.permutation(len(records)) < len(records) // 2
        return [
            replace(x, chosen=x.rejected, rejected=x.chosen) if isinstance(x, Paired) and flip else x
            for x, flip in zip(records, swap, strict=True)
        ]
    order = rng.permutation(len(records))
    labels = [x.desirable for x in records if isinstance(x, Unpaired)]
    return [replace(x, desirable=labels[k]) for x, k in zip(records, order, strict=True) if isinstance(x, Unpaired)]


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
