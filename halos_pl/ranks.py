"""What the ranks of a run agree on, asked from host to host, so that no device is waited for."""

from __future__ import annotations

import weakref
from datetime import timedelta

import torch
import torch.distributed as dist

_patience: timedelta | None = None
_group: weakref.ref[dist.ProcessGroup] | None = None  # torch owns it: what outlives its end aborts the process


def several_ranks() -> bool:
    """Whether this process trains with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def set_patience(patience: timedelta | None) -> None:
    """How long `agree` waits for other ranks, from the next group on that it makes; None: torch's default."""
    global _patience
    _patience = patience


def agree(*values: float) -> tuple[float, ...]:
    """The largest of each value over all ranks; in one process the values themselves.

    A collective: every rank must ask, at the same place. It runs on the CPU (gloo), whatever the ranks train on, in a
    group of its own, made when it is first asked and again after a new `init_process_group`.

    Args:
        values: of this rank; as many on each.

    >>> agree(3, 0)
    (3.0, 0.0)
    """
    if not several_ranks():
        return tuple(map(float, values))
    global _group
    group = _group() if _group is not None else None
    if group is None:
        group = dist.new_group(backend="gloo", timeout=_patience)
        assert isinstance(group, dist.ProcessGroup)
        _group = weakref.ref(group)
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return tuple(found.tolist())
