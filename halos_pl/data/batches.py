"""Which rows make a micro-batch, and when it comes: a function of (seed, epoch) alone, cut over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

from halos_pl.data.cuts import alike, halved, merged, sizes

Index = NDArray[np.int64]
WINDOW = 64  # global batches whose rows are sorted by length together
TRIES = 8  # orders of an epoch that are tried for as few micro-batches as the first epoch has


@dataclass(frozen=True)
class Plan:
    """An epoch of all ranks: where in `rows` the micro-batches [steps, ranks] begin and end, and their longest row."""

    rows: Index
    begins: Index
    ends: Index
    longest: Index
    repeated: int
    left_out: int

    def batch(self, step: int, rank: int) -> list[int]:
        return cast("list[int]", self.rows[self.begins[step, rank] : self.ends[step, rank]].tolist())


class EpochBatches(DistributedSampler[list[int]]):
    """The micro-batches of one rank, as lists of rows; they depend on (seed, epoch) and the arguments alone.

    For `DataLoader(data, batch_size=None, sampler=EpochBatches(...))`, with `data[list_of_rows]`. All ranks have
    equally many micro-batches, none of them empty. Every row comes once an epoch; a remainder is spread over the ranks
    in the last one or two steps. Without `max_tokens`, `group_by_length` and `prompts` the k-th micro-batches of all
    ranks are the k-th slice of one order: batch 8, batch 4 on two ranks, and batch 4 accumulated twice see the same
    rows in an optimizer step; only where fewer rows than ranks are left at the end, the last two steps share them.

    Where ranks cannot have equally many (batch_size 1, fewer rows than ranks), training leaves rows out, others each
    epoch; evaluation puts one more into some micro-batches, whatever `batch_size` and `max_tokens`, and repeats rows
    where there are fewer than ranks.

    Lightning takes the number of micro-batches of the first epoch for that of all. Where it would vary (`max_tokens`,
    `prompts`), every epoch is brought to that of epoch 0 plus 2 % by halving the largest; one that has more is drawn
    anew and sorted by length in windows, wider ones until it fits. With `labels` or `prompts` even that may not do:
    such an epoch is longer, and Lightning does not run its last micro-batches.

    Args:
        size: rows of the data. None, or `labels` of one class alone: no micro-batches.
        batch_size: most rows of a micro-batch.
        shuffle: training, a new order each epoch; otherwise evaluation, the order of the data in every epoch.
        seed: of the order.
        num_replicas: ranks.
        rank: this one.
        labels: bool [size]. Given, rows come in couples, desirable and undesirable, that are never parted: every
            micro-batch holds equal halves (first KTO report, section 5). Of the larger class each epoch takes as many
            rows as the smaller one has, the next ones each time, so that all are seen over the epochs; without
            `shuffle` always the same ones.
        lengths: int [size]. Tokens of each row's longest sequence, as padded: rounded up where the collator does so.
        members: sequences that a row brings (2 for pairs): a micro-batch has members * rows * longest padded tokens.
        max_tokens: most padded tokens of a micro-batch.
        group_by_length: steps of rows of like length, on all ranks, in random order. Rows are sorted in windows of 64
            global batches, so that those of a step depend on the number of ranks. In epoch 0, here and with
            `max_tokens`, the step of the most padded tokens comes first, for memory to run out at once.
        prompts: int [size]. Code of each row's prompt. Rows of a prompt come one after the other, in one micro-batch
            where they fit and the ranks can have equally many micro-batches so.
        drop_last: leave out the last rows that do not fill a micro-batch on every rank.
        start: micro-batches of this rank to leave out in the first epoch that is iterated, however often it is. `len`
            counts them, as Lightning does when it resumes.

    Raises:
        ValueError: options that do not fit together, or a row of more than max_tokens.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        labels: NDArray[np.bool_] | None = None,
        lengths: NDArray[np.integer[Any]] | None = None,
        members: int = 1,
        max_tokens: int | None = None,
        group_by_length: bool = False,
        prompts: NDArray[np.integer[Any]] | None = None,
        drop_last: bool = False,
        start: int = 0,
    ) -> None:
        super().__init__(cast("Dataset[list[int]]", range(size)), num_replicas, rank, shuffle, seed, drop_last)
        self.size, self.batch_size, self.start, self.labels = size, batch_size, start, labels
        self.lengths = np.zeros(size, dtype=np.int64) if lengths is None else lengths.astype(np.int64)
        self.members, self.max_tokens, self.group_by_length = members, max_tokens, group_by_length
        self.prompts, self.unit = prompts, 1 if labels is None else 2  # rows of a couple
        self._fixed = max_tokens is None and prompts is None  # micro-batches of one size
        self.total = size if labels is None else 2 * int(min(labels.sum(), (~labels).sum()))  # rows of an epoch
        self._check(lengths is not None)
        if prompts is not None:
            _, first, codes = np.unique(prompts, return_index=True, return_inverse=True)
            self._codes, self._longest = np.argsort(np.argsort(first))[codes], np.zeros(len(first), dtype=np.int64)
            np.maximum.at(self._longest, self._codes, self.lengths)
        units = WINDOW * (batch_size // self.unit) * num_replicas
        self._window = units if group_by_length else 1  # of units that are sorted by length together
        self._planned: tuple[int, Plan] | None = None
        self._first: int | None = None  # the epoch that `start` is about

    def _check(self, measured: bool) -> None:
        for name in ("labels", "lengths", "prompts"):
            column = getattr(self, name)
            if column is not None and column.shape != (self.size,):
                raise ValueError(f"{name} has shape {column.shape}, the data have {self.size} rows")
        if self.batch_size < self.unit or self.members < 1 or self.start < 0:
            raise ValueError(f"batch_size must be at least {self.unit}, members 1, start 0")
        if self.labels is not None and self.prompts is not None:
            raise ValueError("labels (couples of both classes) and prompts (rows of one prompt) exclude one another")
        if self.drop_last and not self._fixed:
            raise ValueError("drop_last wants micro-batches of one size: not with max_tokens or prompts")
        if not measured and (self.max_tokens is not None or self.group_by_length):
            raise ValueError("max_tokens and group_by_length need lengths")
        least = self.members * self.unit * int(self.lengths.max(initial=0))
        if self.max_tokens is not None and least > self.max_tokens:
            has = f"row {self.lengths.argmax()} has {self.lengths.max()} tokens"
            raise ValueError(f"{has}: max_tokens {self.max_tokens} must be {least} or more")

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch  # when the first one is asked for: Lightning sets it after it has called iter()
        if self._first is None:
            self._first = epoch
        plan = self.plan(epoch)
        for step in range(self.start if epoch == self._first else 0, len(plan.begins)):
            yield plan.batch(step, self.rank)

    def begin(self, epoch: int, start: int = 0) -> None:
        """Let the next iteration be of this epoch, from its start-th micro-batch on."""
        self.set_epoch(epoch)
        self.start, self._first = start, epoch

    def __len__(self) -> int:
        """Micro-batches of this rank in the present epoch, those that `start` leaves out included."""
        return len(self.plan(self.epoch).begins)

    def at(self, epoch: int, step: int) -> list[int]:
        """The rows of this rank's step-th micro-batch of an epoch."""
        return self.plan(epoch).batch(range(len(self.plan(epoch).begins))[step], self.rank)

    @property
    def repeated(self) -> int:
        """Rows that come once more, on whatever rank."""
        return self.plan(self.epoch).repeated

    @property
    def left_out(self) -> int:
        """Rows that no rank gets in this epoch, but for those that the larger class has more."""
        return self.plan(self.epoch).left_out

    def padding(self, epoch: int = 0) -> float:
        """Share of padded positions in an epoch of all ranks, as if the members of a row were of one length."""
        plan = self.plan(epoch)
        upto = np.append(0, np.cumsum(self.lengths[plan.rows]))
        padded = int((plan.longest * (plan.ends - plan.begins)).sum())
        return 1 - int((upto[plan.ends] - upto[plan.begins]).sum()) / padded if padded else 0.0

    def plan(self, epoch: int) -> Plan:
        """The micro-batches of all ranks; the latest plan is kept."""
        epoch = epoch if self.shuffle else 0
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._plan(epoch)
        return self._planned[1]

    def _plan(self, epoch: int) -> Plan:
        world, rng = self.num_replicas, np.random.default_rng([self.seed, epoch])
        rows, offsets, bounds = self._cut_to_goal(rng, epoch)
        atoms = len(offsets) - 1 if self.prompts is None else len(rows)  # what can be a micro-batch by itself
        if atoms < world:
            rows = np.resize(rows, 0 if self.shuffle or not atoms else world * self.unit)
            bounds = np.arange(0, len(rows) + 1, self.unit)
        else:
            steps = max(-(-(len(bounds) - 1) // world), self._goal // world)
            wanted = min(steps, atoms // world) * world
            bounds = offsets[halved(bounds, offsets, wanted)]
            if self.prompts is not None:  # its rows may be parted then
                bounds = halved(bounds, np.arange(len(rows) + 1), wanted)
        if not self.shuffle:
            bounds = merged(bounds, (len(bounds) - 1) % world)
        longest = np.maximum.reduceat(self.lengths[rows], bounds[:-1]) if len(bounds) > 1 else bounds[:-1]
        kept = np.sort(rng.permutation(len(longest))[len(longest) % world :])  # as many for each rank
        begins, ends, longest = (x[kept].reshape(-1, world) for x in (bounds[:-1], bounds[1:], longest))
        used = int((ends - begins).sum())
        order = rng.permutation(len(begins)) if self.shuffle and self.group_by_length else np.arange(len(begins))
        if self.shuffle and epoch == 0 and used and (self.group_by_length or self.max_tokens is not None):
            largest = ((ends - begins) * longest).max(axis=1)[order].argmax()
            order[[0, largest]] = order[[largest, 0]]
        begins, ends, longest = begins[order], ends[order], longest[order]
        return Plan(rows, begins, ends, longest, max(0, used - self.total), max(0, self.total - used))

    @cached_property
    def _goal(self) -> int:
        """Micro-batches of every epoch, where their number would vary: those of epoch 0, and 2 % more."""
        if self._fixed or not self.shuffle:
            return 0
        count = len(self._cut(*self._units(np.random.default_rng([self.seed, 0]), 0, self._window))) - 1
        return -(-(count + count // 50 + 1) // self.num_replicas) * self.num_replicas

    def _cut_to_goal(self, rng: np.random.Generator, epoch: int) -> tuple[Index, Index, Index]:
        """Rows, where the units in them begin, and which units begin a micro-batch."""
        window = self._window
        for _ in range(TRIES):
            rows, offsets = self._units(rng, epoch, window)
            bounds = self._cut(rows, offsets)
            if not self._goal or len(bounds) - 1 <= self._goal:
                break
            window = max(8 * window, 4 * (self.batch_size // self.unit))
        return rows, offsets, bounds

    def _units(self, rng: np.random.Generator, epoch: int, window: int) -> tuple[Index, Index]:
        """What stays together, in order: rows, couples, or the rows of a prompt as far as a micro-batch takes them."""
        if self.prompts is not None:
            return self._prompts_together(rng, window)
        cap = self.batch_size // self.unit
        if self.labels is not None:
            columns = self._couples(rng, epoch)
        else:
            columns = [rng.permutation(self.size) if self.shuffle else np.arange(self.size)]
        if self._fixed and (self.shuffle or self.drop_last):  # before sorting, so that others are left out each epoch
            whole = self.num_replicas * cap if self.drop_last or cap == 1 else 1
            columns = [column[: len(column) // whole * whole] for column in columns]
        if window > 1:  # columns apart: the i-th longest of both classes meet
            columns = [column[alike(self.lengths[column], window)] for column in columns]
        rows = np.stack(columns, axis=1).reshape(-1)
        return rows, np.arange(0, len(rows) + 1, self.unit)

    def _couples(self, rng: np.random.Generator, epoch: int) -> list[Index]:
        assert self.labels is not None
        half, columns = self.total // 2, []
        for label in (True, False):
            fixed = np.random.default_rng(self.seed).permutation(np.flatnonzero(self.labels == label))
            rows = np.roll(fixed, -half * epoch)[:half]  # without shuffle, epoch is 0
            columns.append(rng.permutation(rows) if self.shuffle else np.sort(rows))
        return columns

    def _prompts_together(self, rng: np.random.Generator, window: int) -> tuple[Index, Index]:
        kinds = len(self._longest)
        rows = rng.permutation(self.size) if self.shuffle else np.arange(self.size)
        sequence = rng.permutation(kinds) if self.shuffle else np.arange(kinds)
        if window > 1:
            sequence = sequence[alike(self._longest[sequence], window)]
        rows = rows[np.argsort(np.argsort(sequence)[self._codes[rows]], kind="stable")]
        sizes = np.bincount(self._codes, minlength=kinds)[sequence]
        most = np.full(kinds, self.batch_size)
        if self.max_tokens is not None:
            most = np.minimum(most, self.max_tokens // (self.members * np.maximum(1, self._longest[sequence])))
        within = np.arange(self.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return rows, np.append(np.flatnonzero(within % np.repeat(most, sizes) == 0), self.size)

    def _cut(self, rows: Index, offsets: Index) -> Index:
        units = len(offsets) - 1
        if self._fixed:
            return np.append(0, np.cumsum(sizes(units, self.batch_size // self.unit, self.num_replicas)))
        longest = np.maximum.reduceat(self.lengths[rows], offsets[:-1]) if units else offsets[:-1]
        limit = np.inf if self.max_tokens is None else self.max_tokens // self.members
        bounds = [0]
        while (at := bounds[-1]) < units:
            size = offsets[at + 1 : at + 1 + self.batch_size] - offsets[at]
            tokens = size * np.maximum.accumulate(longest[at : at + self.batch_size])
            bounds.append(at + int(np.count_nonzero((size <= self.batch_size) & (tokens <= limit))))
        return np.array(bounds)
