"""Where a run is in its data, and where it goes on when it is resumed with other batches."""

from __future__ import annotations

import lightning as L


def place_of(trainer: L.Trainer) -> tuple[int, int]:
    """Epoch, and micro-batch of it, that a run takes next: of its progress, fresh or restored.

    Returns:
        (epoch, micro-batches of a rank that are done), both from 0.
    """
    loop = trainer.fit_loop
    done, limit = loop.epoch_loop.batch_progress.current.ready, _limit(trainer)
    over = done >= limit
    return loop.epoch_progress.current.completed + over, 0 if over else done


def _limit(trainer: L.Trainer) -> float:
    """Micro-batches of an epoch. An iterator is first made before the trainer has told how many."""
    loader = trainer.fit_loop._combined_loader
    length = len(loader.flattened[0]) if loader is not None else 0
    share = trainer.limit_train_batches
    return min(length, share) if isinstance(share, int) else int(length * share)
