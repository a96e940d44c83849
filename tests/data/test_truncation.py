"""Lengths by hand, and the rule against a loop over single rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halos_pl.data.truncation import Truncation


def by_hand(prompt: int, completion: int, control: int, most: int, share: int) -> tuple[int, int]:
    """Take from the prompt's left while it is above its share and the row is too long; then from the completion."""
    while prompt + control + completion > most and prompt + control > share:
        prompt -= 1
    while prompt + control + completion > most:
        completion -= 1
    return prompt, completion


@given(
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    completion=st.integers(1, 40),
    control=st.integers(0, 2),
    share=st.integers(3, 20),
    free=st.integers(1, 20),
)
def test_sizes(prompts: list[int], completion: int, control: int, share: int, free: int) -> None:
    rule = Truncation(share + free, share)
    before = np.array(prompts)
    kept, fitting = rule.sizes(before, np.full_like(before, completion), control)
    wanted = [by_hand(x, completion, control, share + free, share) for x in prompts]
    assert list(zip(kept.tolist(), fitting.tolist(), strict=True)) == wanted
    assert (fitting >= 1).all(), "something is left to score"
    report = rule.report(before, np.full_like(before, completion), control)
    assert report.prompts == sum(a < x for (a, _), x in zip(wanted, prompts, strict=True))
    assert report.completions == sum(b < completion for _, b in wanted)
    assert report.truncated == sum((a, b) != (x, completion) for (a, b), x in zip(wanted, prompts, strict=True))


@pytest.mark.parametrize(
    ("ids", "lead", "size", "kept"),
    [
        ([1, 7, 8, 9], [1], 4, [1, 7, 8, 9]),
        ([1, 7, 8, 9], [1], 3, [1, 8, 9]),
        ([1, 7, 8, 9], [1], 1, [1]),
        ([1, 7, 8, 9], [], 2, [8, 9]),
        ([5, 7, 8, 9], [1], 2, [8, 9]),
        ([1, 2, 7, 8], [1, 2], 3, [1, 2, 8]),
        ([1, 2, 7, 8], [1, 2], 1, [1]),
    ],
)
def test_a_prompt_keeps_its_end_and_its_bos(ids: list[int], lead: list[int], size: int, kept: list[int]) -> None:
    assert Truncation(9, 4, lead).prompt(np.array(ids, np.int32), size).tolist() == kept
