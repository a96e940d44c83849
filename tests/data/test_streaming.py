"""A streamed dataset is read once, a little at a time, and has y′ from all of its rows like any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from halos_pl.batch import DataNeeds
from halos_pl.data import AlignmentData, writers
from halos_pl.data import prepare as module
from halos_pl.data.sources import Source
from halos_pl.data.store import write_block

ROWS = 600


def stream() -> Iterator[dict[str, Any]]:
    for i in range(ROWS):
        yield {"prompt": f"p{i // 2}", "completion": f"c{i}", "label": i % 2 == 0}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows asked for, rows on disk) at every block that is written."""
    found, asked, written = [], [0], [0]

    def counted() -> Iterator[dict[str, Any]]:
        for row in stream():
            asked[0] += 1
            yield row

    def load_dataset(name: str, **options: Any) -> Any:
        assert options["streaming"] is True
        asked[0] = 0
        return datasets.IterableDataset.from_generator(counted)

    def write(path: Path, rows: list[Any], notes: Any) -> None:
        found.append((asked[0], written[0]))
        written[0] += len(rows)
        write_block(path, rows, notes)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    builder = SimpleNamespace(config_id="default", hash="abc")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, **options: builder)
    monkeypatch.setattr(writers, "write_block", write)
    monkeypatch.setattr(module, "BLOCK", 50)
    return found


def setup(model: Path, cache: Path, source: Source) -> AlignmentData:
    data = AlignmentData(train=source, batch_size=8, cache=str(cache))
    data.needs = DataNeeds("unpaired", mismatched=True, tokenizer=str(model), vocab_size=260, max_positions=None)
    data.setup("fit")
    return data


def test_rows_go_to_disk_as_they_come(tiny_model: Path, tmp_path: Path, seen: list[tuple[int, int]]) -> None:
    dataset = setup(tiny_model, tmp_path, Source("org/name", streaming=True)).datasets["train"]
    assert len(dataset) == ROWS
    assert len(seen) == ROWS // 50
    assert max(asked - written for asked, written in seen) <= 51, "no more than a block is held"
    assert dataset.partners is not None
    assert sorted(dataset.partners) == list(range(ROWS)), "every completion is somebody's y′"
    assert (dataset.prompts != dataset.prompts[dataset.partners]).all()
    assert (dataset.completions != dataset.completions[dataset.partners]).all()
    seen.clear()
    again = setup(tiny_model, tmp_path, Source("org/name", streaming=True)).datasets["train"]
    assert not seen, "the same version of the dataset is not read again"
    assert (again.partners == dataset.partners).all()


def test_a_limit_takes_the_first_rows(tiny_model: Path, tmp_path: Path, seen: list[tuple[int, int]]) -> None:
    dataset = setup(tiny_model, tmp_path, Source("org/name", streaming=True, limit=120)).datasets["train"]
    assert [x.origin.row for x in dataset.examples()] == list(range(1, 121))
    assert max(asked for asked, _ in seen) <= 121
