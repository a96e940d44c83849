"""Micro-batches of a dataset, in the order of an epoch."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from halos_pl.batch import DataNeeds
from halos_pl.data.batches import EpochBatches
from halos_pl.data.collate import Collator
from halos_pl.data.dataset import FeedbackDataset
from halos_pl.data.records import DataError, DataWarning
from halos_pl.data.tokenization import CompletionTokenizer

Stage = Literal["train", "validation", "test", "predict"]


@dataclass(frozen=True)
class LoaderOptions:
    """What `AlignmentData` documents under these names; `stratified` and `batch_size` are those of the stage."""

    batch_size: int
    max_tokens: int | None
    stratified: bool
    group_by_length: bool
    group_by_prompt: bool
    pair_in_batch: bool
    pad_to_multiple_of: int
    length_groups: int
    num_workers: int
    seed: int


class PlacedLoader(DataLoader[Any]):
    """A loader that asks where the run is when the first batch of an iteration is, so that a run resumes anywhere.

    Lightning makes an iterator before it restores the progress of a run, and sets the epoch after worker processes have
    fetched.

    Args:
        place: epoch and micro-batch to begin with.
        options: of `DataLoader`; the sampler is an `EpochBatches`.
    """

    def __init__(self, *, place: Callable[[], tuple[int, int]], **options: Any) -> None:
        super().__init__(**options)
        self.place = place

    def __iter__(self) -> Any:
        assert isinstance(self.sampler, EpochBatches)
        self.sampler.begin(*self.place())
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the order is a function of the place. Lightning takes loaders that have it for resumable ones."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def refuse_other_rows(dataset: FeedbackDataset, stage: Stage) -> None:
    """DataError where the ranks have read different rows, as of a file that grew between one and the next."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, dataset.identity)
    if len(set(found)) > 1:
        raise DataError(
            f"data.{stage}: the ranks have read different rows: the files changed between one start and the next, or "
            "differ from host to host; give all ranks one copy that stays as it is"
        )


def make_loader(
    dataset: FeedbackDataset,
    encoder: CompletionTokenizer,
    needs: DataNeeds,
    options: LoaderOptions,
    *,
    stage: Stage,
    world: int = 1,
    rank: int = 0,
    place: Callable[[], tuple[int, int]] | None = None,
) -> DataLoader[Any]:
    """The loader of one rank. Its batches do not depend on the number of its worker processes. With `place`, it begins
    where that says.

    Raises:
        DataError: no row makes a micro-batch, or one alone is longer than `max_tokens`.
    """
    training = stage == "train"
    halves = options.stratified and stage != "predict" and not dataset.paired
    by_length = options.group_by_length and training
    multiple = options.pad_to_multiple_of
    padded = np.maximum(dataset.lengths, np.minimum(-(-dataset.lengths // multiple) * multiple, encoder.max_length))
    try:
        batches = EpochBatches(
            len(dataset),
            batch_size=options.batch_size,
            shuffle=training,
            seed=options.seed,
            num_replicas=world,
            rank=rank,
            labels=dataset.labels if halves else None,
            lengths=padded if by_length or options.max_tokens is not None else None,
            members=dataset.members.width,
            max_tokens=options.max_tokens,
            group_by_length=by_length,
            prompts=dataset.row_prompts if options.group_by_prompt and training else None,
            drop_last=options.pair_in_batch,  # a last batch of one row would find no y′
        )
    except ValueError as error:
        raise DataError(f"{stage}: {error}") from error
    if not len(batches):
        raise DataError(
            f"no row is left to train on: {len(dataset)} rows on {world} ranks"
            f"{', stratified (which needs both classes)' if halves else ''}"
            f"{'; each rank needs one: use fewer devices' if 0 < len(dataset) < world else ''}"
        )
    if not training and batches.repeated:
        told = f"{stage}: {batches.repeated} rows count twice, so that each of {world} ranks has some"
        warnings.warn(told, DataWarning, stacklevel=2)
    collator = Collator(
        view=needs.view,
        pad_id=encoder.tokenizer.pad_token_id,
        vocab_size=needs.vocab_size,
        max_length=encoder.max_length,
        pad_to_multiple_of=multiple,
        length_groups=options.length_groups,
        pair_in_batch=options.pair_in_batch,
        scores=needs.scores and stage != "predict",
        same_blocks=world > 1,
    )
    how: dict[str, Any] = {
        "dataset": dataset,
        "batch_size": None,  # the sampler names whole micro-batches
        "sampler": batches,
        "collate_fn": collator,
        "num_workers": options.num_workers,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": options.num_workers > 0,
        "worker_init_fn": _ignore_signals if options.num_workers else None,
    }
    return DataLoader(**how) if place is None else PlacedLoader(place=place, **how)


def _ignore_signals(worker: int) -> None:
    """A signal to the whole run must not take the batches from a step that it still finishes: the run ends workers."""
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
