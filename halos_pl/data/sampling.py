"""Which row comes when: a function of (seed, epoch) alone, cut over the ranks in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

Index = NDArray[np.int64]


class EpochSampler(DistributedSampler[int]):
    """Row indices of one rank, in an order that depends on (seed, epoch) alone.

    Rank r takes every `num_replicas`-th row (with labels: every such couple of rows) from the r-th on. The k-th
    micro-batches of all ranks together are therefore the k-th slice of one global order, and batch 8, batch 4 on two
    ranks, and batch 4 accumulated twice see the same rows.

    Args:
        size: rows of the data.
        shuffle: a new order each epoch; otherwise the order of the data.
        seed: of the order.
        num_replicas: ranks.
        rank: this one.
        drop_last: with several ranks, leave out the last rows that do not fill one row a rank (other rows each epoch);
            otherwise the first rows of the order are repeated, as torch's DistributedSampler does.
        labels: bool [size]. Given, rows come in couples, desirable and undesirable, so that every batch of an even size
            holds equal halves (first KTO report, section 5). Of the larger class each epoch takes as many rows as the
            smaller one has, the next ones each time, so that all of them are seen over the epochs; without `shuffle`
            always the same ones.
    """

    def __init__(
        self,
        size: int,
        *,
        shuffle: bool,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
        labels: NDArray[np.bool_] | None = None,
    ) -> None:
        self.labels = labels
        self.unit = 1 if labels is None else 2  # rows that stay together
        units = range(size if labels is None else min(labels.sum(), (~labels).sum()))
        super().__init__(
            cast("Dataset[int]", units), num_replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last
        )
        self.num_samples *= self.unit
        self.total_size *= self.unit

    def order(self) -> Index:
        """The global order of the present epoch, before it is cut over the ranks."""
        rng = np.random.default_rng([self.seed, self.epoch])
        size = len(cast(Sized, self.dataset))
        if self.labels is not None:
            return self._alternate(rng, size)
        return rng.permutation(size) if self.shuffle else np.arange(size)

    def _alternate(self, rng: np.random.Generator, half: int) -> Index:
        assert self.labels is not None
        columns = []
        for label in (True, False):
            rows = np.flatnonzero(self.labels == label)
            fixed = np.random.default_rng(self.seed).permutation(rows)
            if self.shuffle:
                columns.append(rng.permutation(np.roll(fixed, -half * self.epoch)[:half]))
            else:
                columns.append(np.sort(fixed[:half]))
        return np.stack(columns, axis=1).reshape(-1)

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        if self.drop_last:
            order = order[: self.total_size]
        elif missing := self.total_size - len(order):
            order = np.concatenate([order, np.resize(order, missing)])
        mine = order.reshape(-1, self.unit)[self.rank :: self.num_replicas]
        return iter(mine.reshape(-1).tolist())
