"""From sources to a dataset: tokenized, in the view of an objective, paired with y′, and accounted for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from halos_pl.batch import DataNeeds, View
from halos_pl.data.dataset import FeedbackDataset
from halos_pl.data.mixture import held_out, repeats, select
from halos_pl.data.pairing import mismatch
from halos_pl.data.prepare import Preparation
from halos_pl.data.records import LISTED, BadRows, DataError, DataWarning
from halos_pl.data.sources import Source
from halos_pl.data.store import Bad, Corpus
from halos_pl.data.views import Index, Members, Refusal, as_demonstrations, as_paired, as_unpaired, only_kind


@dataclass(frozen=True)
class DatasetBuilder:
    """How sources become a dataset.

    Args:
        prepare: tokenizes them, or finds their tokens.
        needs: of the objective.
        pair_all: give every row a y′ from the whole dataset.
        unpair: for unpaired objectives: both members of a pair, or one.
        pair_labels: for paired objectives: make pairs of one prompt's labelled completions.
        seed: of y′, members, rows to keep, rows of a mixture and permuted labels.
    """

    prepare: Preparation
    needs: DataNeeds
    pair_all: bool
    unpair: Literal["both", "one"]
    seed: int
    pair_labels: bool = False

    def build(
        self,
        sources: Sequence[Source],
        *,
        training: bool = False,
        labelled: bool = True,
        hold_out: float | None = None,
        keep: tuple[float, float] = (1.0, 1.0),
        shuffle_labels: bool = False,
    ) -> FeedbackDataset:
        """Read, tokenize and pair.

        Args:
            sources: of the rows.
            training: otherwise pairs stay together for an unpaired objective too, where it has no control.
            labelled: whether a single completion must have a label (and a score, where the objective reads it).
            hold_out: leave out this share of the prompts when training, else take only these.
            keep: shares of the desirable and of the undesirable completions to take.
            shuffle_labels: permute labels, or swap half of the pairs, of what is kept: the control experiment.

        Raises:
            DataError: bad rows (unless skipped), rows of another view, or no y′ for some row.
        """
        prepared = [self.prepare(source) for source in sources]
        corpus = Corpus([path for x in prepared for path in x.blocks])
        counts = [sum(corpus.counts[path] for path in x.blocks) for x in prepared]
        named = ", ".join(x.name for x in sources)
        again = hold_out is not None and not training  # the same rows as those that are trained on
        bad = [] if again else [row for x in prepared for row in x.bad]
        records = select(prepared, counts, seed=self.seed, weighted=training)
        if hold_out is not None:
            mine = held_out(corpus, records, hold_out)
            records = records[~mine if training else mine]
        if not len(records):
            why = f"all {len(bad)} are bad, the first: {bad[0][2]}" if bad else "none is left"
            raise DataError(f"{named}: no row can be used; {why}")
        notes: list[str] = []
        members = self._in_view(corpus, records, training, labelled, bad, notes)
        if not len(members):
            raise DataError(f"{named}: no row can be used" + (f"; the first: {bad[0][2]}" if bad else ""))
        if keep != (1.0, 1.0):
            members = _share(members, keep, self.seed, notes)
        if shuffle_labels:
            members = _with_shuffled_labels(members, self.seed)
        dataset = FeedbackDataset(corpus, members, self.prepare.encoder)
        if self.pair_all:
            dataset.partners = self._partners(dataset)
        if self.needs.equal_halves and labelled and not dataset.paired:
            _surplus(dataset, training, named, notes)
        _repetitions(dataset, notes)
        dataset.bad = bad
        dataset.report = "; ".join([_count(dataset, self.needs.view), *notes, f"{dataset.cut}{_skipped(bad)}"])
        return dataset

    def _in_view(
        self, corpus: Corpus, records: Index, training: bool, labelled: bool, bad: list[Bad], notes: list[str]
    ) -> Members:
        mixed = only_kind(corpus, records)
        self._refuse([mixed] if mixed else [], corpus, bad)
        if mixed:
            records = records[~np.isin(records, mixed.records)]
        view, together = self.needs.view, self.needs.control is None
        if not labelled and not corpus.paired[records].any():
            return Members(records, np.zeros(len(records), np.int8), corpus.label[records], corpus.score[records])
        if view == "sft":
            demonstrations = as_demonstrations(corpus, records)
            if not len(demonstrations):
                raise DataError(
                    f"{corpus.files[corpus.file[records[0]]]}: all completions are labelled undesirable: nothing to "
                    "imitate"
                )
            return demonstrations
        scores = self.needs.scores and labelled
        if view == "paired" or (not (training or scores) and together and corpus.paired[records].all()):
            members, refused, alone = as_paired(corpus, records, match=self.pair_labels and view == "paired")
            if alone:
                notes.append(f"{alone} labelled completions found no partner")
        else:
            some = self.unpair if training else "both"
            members, refused = as_unpaired(corpus, records, members=some, scores=scores, seed=self.seed)
        self._refuse(refused, corpus, bad)
        if training and view == "unpaired":
            _warn_of_one_class(corpus, members)
        return members

    def _refuse(self, refused: Sequence[Refusal], corpus: Corpus, bad: list[Bad]) -> None:
        told = BadRows(self.prepare.on_bad_row)
        for refusal in refused:
            for record, error in replace(refusal, records=np.unique(refusal.records)).errors(corpus):
                bad.append((corpus.files[corpus.file[record]], int(corpus.row[record]), str(error)))
                with told.caught():
                    raise error
        told.finish()

    def _partners(self, dataset: FeedbackDataset) -> Index:
        try:
            partners, shared = mismatch(dataset.prompts, dataset.completions, seed=self.seed)
        except ValueError as error:
            raise DataError(
                f"{dataset.example(error.args[1]).origin}: no other row has another prompt with another completion, so "
                "there is no y′ to estimate KTO's reference point on; give data with several prompts, or go without "
                "the reference point: --model.objective.reference_point false"
            ) from None
        if shared:
            warnings.warn(
                f"{shared} of {len(partners)} rows share their y′ with another row: one prompt has most of the rows",
                DataWarning,
                stacklevel=2,
            )
        return partners


def _share(members: Members, keep: tuple[float, float], seed: int, notes: list[str]) -> Members:
    """The rows that come first in a permutation of all, so many of each class, in their own order."""
    place = np.random.default_rng([seed, 2]).permutation(len(members))
    desirable = members.label == 1
    taken, told = np.zeros(len(members), bool), []
    for name, share, member in (("desirable", keep[0], desirable), ("undesirable", keep[1], ~desirable)):
        rows = np.flatnonzero(member)
        chosen = rows[np.argsort(place[rows])][: max(1, round(share * len(rows)))]
        taken[chosen] = True
        told.append(f"{len(chosen)} of {len(rows)} {name}")
    notes.append(f"kept {' and '.join(told)} rows")
    return members.take(taken)


def _surplus(dataset: FeedbackDataset, training: bool, named: str, notes: list[str]) -> None:
    """Note what equal halves leave out of held-out rows; training shows other rows each epoch."""
    up = int(dataset.labels.sum())
    size, down = len(dataset), len(dataset) - up
    if not up or not down:
        side = "desirable" if up else "undesirable"
        raise DataError(
            f"{named}: all {size} rows are {side}; this objective needs as many of both classes in every micro-batch: "
            "give rows of the other class too"
        )
    if not training and up != down:
        side = "desirable" if up > down else "undesirable"
        notes.append(f"{abs(up - down)} of {max(up, down)} {side} rows are left out, so that halves are equal")


def _repetitions(dataset: FeedbackDataset, notes: list[str]) -> None:
    members = dataset.members
    member = 2 * members.record + members.side
    order = np.argsort(member, kind="stable")
    once = order[np.append(True, np.diff(member[order]) > 0)]  # a weight repeats rows on purpose
    again, both = repeats(dataset.prompts[once], dataset.completions[once], members.label[once])
    if again:
        notes.append(f"{again:,} duplicates")
    if both:
        notes.append(f"{both:,} completions with both labels")


def _with_shuffled_labels(members: Members, seed: int) -> Members:
    rng = np.random.default_rng([seed, 1])
    if members.width == 2:
        pairs = len(members) // 2
        swap = rng.permutation(pairs) < pairs // 2
        order = np.arange(len(members)).reshape(-1, 2)
        order[swap] = order[swap, ::-1]
        return replace(members.take(order.reshape(-1)), label=members.label)
    order = rng.permutation(len(members))
    return replace(members, label=members.label[order], score=members.score[order])


def _warn_of_one_class(corpus: Corpus, members: Members) -> None:
    if len(members) and (members.label == members.label[0]).all():
        side = "desirable" if members.label[0] else "undesirable"
        file = corpus.files[corpus.file[members.record[0]]]
        warnings.warn(
            f"{file}: all {len(members)} rows are {side}: the loss can only push one way", DataWarning, stacklevel=2
        )


def _count(dataset: FeedbackDataset, view: View) -> str:
    if dataset.paired:
        return f"{len(dataset):,} pairs"
    if view == "sft":
        return f"{len(dataset):,} demonstrations"
    return f"{len(dataset):,} examples, {int(dataset.labels.sum()):,} of them desirable"


def _skipped(bad: Sequence[Bad]) -> str:
    listed = [f"\n  skipped {message}" for _, _, message in bad[:LISTED]]
    more = len(bad) - len(listed)
    return "".join(listed) + (f"\n  skipped {more:,} more" if more else "")
