"""y′ comes from another prompt with another completion, whatever the data look like."""

from __future__ import annotations

import numpy as np
import pytest

from halos_pl.data.pairing import mismatch


def keys(text: str) -> list[bytes]:
    return [c.encode() for c in text]


def assert_mismatched(prompts: str, completions: str, partner: np.ndarray) -> None:
    for i, j in enumerate(partner):
        assert prompts[i] != prompts[j], f"row {i} got its own prompt"
        assert completions[i] != completions[j], f"row {i} got its own completion"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("prompts", "completions"),
    [
        ("abcdefgh", "stuvwxyz"),
        ("aabbccdd", "stuvwxyz"),  # pairs, as unpaired preference data bring them
        ("aaaabcde", "stuvwxyz"),  # one prompt owns half of the rows
        ("abcdefgh", "sssstuvw"),  # half of the completions are equal
        ("ab", "yz"),
    ],
)
def test_is_a_derangement_over_prompts_and_completions(prompts: str, completions: str, seed: int) -> None:
    partner, shared = mismatch(keys(prompts), keys(completions), seed=seed)
    assert_mismatched(prompts, completions, partner)
    assert shared == 0
    assert sorted(partner) == list(range(len(prompts))), "every completion serves once"


def test_many_rows_of_few_completions() -> None:
    rng = np.random.default_rng(0)
    prompts = "".join(chr(int(c)) for c in 100 + rng.integers(0, 300, 2000))
    completions = "".join(chr(int(c)) for c in 100 + rng.integers(0, 20, 2000))
    partner, shared = mismatch(keys2(prompts), keys2(completions), seed=3)
    assert_mismatched(prompts, completions, partner)
    assert shared == 0
    assert len(set(partner.tolist())) == 2000


def keys2(text: str) -> list[bytes]:
    return [c.encode("utf-8") for c in text]


def test_is_a_function_of_rows_and_seed() -> None:
    prompts, completions = keys("aabbccddeeff"), keys("ghijklmnopqr")
    first, _ = mismatch(prompts, completions, seed=1)
    again, _ = mismatch(prompts, completions, seed=1)
    other, _ = mismatch(prompts, completions, seed=2)
    assert (first == again).all()
    assert (first != other).any()


def test_shares_partners_where_no_permutation_exists() -> None:
    prompts, completions = "aaaaab", "uvwxyz"
    partner, shared = mismatch(keys(prompts), keys(completions), seed=0)
    assert_mismatched(prompts, completions, partner)
    assert shared > 0


@pytest.mark.parametrize(
    ("prompts", "completions", "row"), [("aaa", "xyz", 0), ("abc", "xxx", 0), ("a", "x", 0), ("ab", "xx", 0)]
)
def test_refuses_rows_without_any_partner(prompts: str, completions: str, row: int) -> None:
    with pytest.raises(ValueError, match="another prompt with another completion") as error:
        mismatch(keys(prompts), keys(completions), seed=0)
    assert isinstance(error.value.args[1], int)


def test_no_rows() -> None:
    partner, shared = mismatch([], [], seed=0)
    assert len(partner) == 0
    assert shared == 0
