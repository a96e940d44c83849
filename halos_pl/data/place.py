"""Where a run is in its data, and where it goes on when it is resumed, also with other micro-batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L

from halos_pl.data.records import DataWarning


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


def counted_in(options: Mapping[str, Any], identity: str, world: int) -> dict[str, Any]:
    """What the place in an epoch is counted in: `identity` of the rows, `order`, and `rows` of a micro-batch over all
    ranks, or what that hangs on where it varies.

    Args:
        options: of the data module, by name.
        identity: of the training rows.
        world: ranks.
    """
    order = [options[name] for name in ("sampler", "max_tokens", "group_by_length", "group_by_prompt")]
    order += [int(options["seed"])]  # a config's is of a class of the parser
    varies = options["max_tokens"] is not None or options["group_by_length"] or options["group_by_prompt"]
    rows = options["batch_size"] * world
    return {"identity": identity, "order": order, "rows": [options["batch_size"], world] if varies else rows}


def go_on(stored: dict[str, Any], own: dict[str, Any], trainer: L.Trainer, length: Callable[[], int]) -> None:
    """Before a run takes up the progress of a checkpoint, count it in this run's micro-batches.

    Args:
        stored: what `counted_in` told of the checkpoint's run.
        own: the same of this run.
        trainer: with the checkpoint at hand.
        length: micro-batches of an epoch of this run.

    Warns:
        DataWarning: rows of the present epoch may come twice or not at all.
    """
    progress = trainer._checkpoint_connector._loaded_checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done, over = progress["current"]["ready"], progress["is_last_batch"]
    other = ["rows"] if stored["identity"] != own["identity"] else []
    other += ["order"] if stored["order"] != own["order"] else []
    same = stored["rows"] == own["rows"]
    if not same or (over and other):
        new = length() if over else done
        if not over and isinstance(stored["rows"], int) and isinstance(own["rows"], int):
            new, rest = divmod(done * stored["rows"], own["rows"])
            window = trainer.accumulate_grad_batches
            other += ["micro-batches"] if rest or new % window else []
            new -= new % window
        elif not over:
            other.append("micro-batches")
        for counts in (progress["current"], progress["total"]):
            for name in counts:
                counts[name] += new - done
    if other and done and not over:
        told = f"the {' and the '.join(other)} of the data differ from those of the checkpoint, which was taken in the "
        warnings.warn(told + "middle of an epoch: rows of it may come twice or not at all", DataWarning, stacklevel=2)
