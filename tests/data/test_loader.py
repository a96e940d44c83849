"""Loaders of several ranks: the same rows for all, or a word about it."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from halos_pl.batch import DataNeeds
from halos_pl.data import AlignmentData, DataError


def rank_of_two(rank: int, port: int, file: str, model: str, cache: str, said: Any) -> None:
    """A process that reads one file, in a group of two."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    data = AlignmentData(train=file, cache=cache)
    data.needs = DataNeeds("unpaired", mismatched=True, tokenizer=model, vocab_size=260, max_positions=None)
    data.setup("fit")
    try:
        data.train_dataloader()
        said.put("agreed")
    except DataError as error:
        said.put(str(error))
    dist.destroy_process_group()


@pytest.mark.parametrize("grown", [False, True])
def test_ranks_with_other_rows_stop(grown: bool, thumbs_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    longer = tmp_path / "longer.jsonl"
    longer.write_bytes(thumbs_file.read_bytes() + b'{"prompt": "a", "completion": "b", "label": true}\n')
    files = [str(thumbs_file), str(longer if grown else thumbs_file)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    ranks = [
        context.Process(target=rank_of_two, args=(i, port, files[i], str(tiny_model), str(tmp_path), said))
        for i in range(2)
    ]
    for process in ranks:
        process.start()
    found = [said.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(60)
    if grown:
        assert all(x.startswith("data.train: the ranks have read different rows") for x in found)
    else:
        assert found == ["agreed", "agreed"]
