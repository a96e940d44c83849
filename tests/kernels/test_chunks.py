"""Widths of chunks and blocks of rows: within their bounds, even, and a function of shapes alone."""

from __future__ import annotations

import pytest
import torch
from halos_kernels.chunks import LIMITS, by_rows, limits, width
from halos_kernels.inputs import Inputs, Transform


def call(n: int, v: int, d: int = 8, dtype: torch.dtype = torch.float32) -> Inputs:
    hidden, weight = (torch.zeros(1, 1, dtype=dtype).expand(rows, d) for rows in (n, v))
    return Inputs(hidden, weight, None, torch.zeros(1, dtype=torch.long).expand(n), Transform(), n)


@pytest.mark.parametrize("v", [1, 2, 17, 100, 301, 1000, 32000, 50257, 151936])
@pytest.mark.parametrize("n", [0, 1, 7, 96, 683, 1024, 8192, 65536])
def test_a_chunk_is_a_small_part_of_all_logits(n, v):
    bound = LIMITS["cpu"]
    columns = width(call(n, v))
    assert 1 <= columns <= v
    if n * v >= 32 * 4096 * 2:
        assert columns * n <= n * v / 16
    assert columns * n * 4 <= max(bound.workspace * 1.1, bound.columns * n * 4 * 1.5, 4 * 4096)
    chunks = -(-v // columns)
    last = v - (chunks - 1) * columns
    assert columns < 32 or last > columns // 2 or chunks > 8, (
        "even chunks, none a sliver that costs a product of its own"
    )


def test_many_rows_of_a_small_vocabulary_are_cut_into_rows_and_not_into_columns():
    whole = call(65536, 100)
    assert width(whole.rows(slice(0, 1024))) == 100
    assert width(whole) < 10


@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 1025, 2049, 5000])
def test_blocks_of_rows_are_equal_and_in_order(n):
    seen = []

    def score(block: Inputs) -> tuple[torch.Tensor, ...]:
        seen.append(block.hidden.shape[0])
        assert block.tokens == n
        return (block.targets,)

    inputs = call(n, 9)._replace(targets=torch.arange(n))
    (rows,) = by_rows(score, inputs)
    assert rows.tolist() == list(range(n))
    assert max(seen) <= limits(torch.device("cpu")).rows
    assert max(seen) - min(seen) < max(2, len(seen))
