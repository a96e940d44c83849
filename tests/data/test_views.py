"""Labelled completions, pairs and demonstrations of the same records, and back again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from halos_pl.data.records import Origin, Paired, Record, Unpaired
from halos_pl.data.store import Corpus, Notes, write_block
from halos_pl.data.tokenization import Encoded
from halos_pl.data.views import Members, as_demonstrations, as_paired, as_unpaired, each_turn, only_kind


def thumb(
    row: int, label: bool | None, prompt: str = "p", text: str | None = None, score: float | None = None
) -> Unpaired:
    return Unpaired(prompt, text or f"t{row}", label, Origin("f.jsonl", row), None, score)


def pair(row: int, prompt: str = "p", **options: object) -> Paired:
    return Paired(prompt, f"good{row}", f"bad{row}", Origin("f.jsonl", row), **options)  # type: ignore[arg-type]


@pytest.fixture
def corpus_of(tmp_path: Path) -> object:
    def make(*records: Record) -> Corpus:
        path = tmp_path / "0.arrow"
        ids = [Encoded([1], [[2, 9], [3, 4, 9]] if isinstance(x, Paired) else [[5, 9]]) for x in records]
        write_block(path, list(zip(records, ids, strict=True)), Notes([], []))
        return Corpus([path])

    return make


def every(corpus: Corpus) -> np.ndarray:
    return np.arange(len(corpus))


def told(members: Members) -> list[tuple[int, int, int]]:
    return list(zip(members.record.tolist(), members.side.tolist(), members.label.tolist(), strict=True))


def test_pairs_become_labelled_completions_side_by_side(corpus_of) -> None:
    corpus = corpus_of(pair(1), thumb(2, False), pair(3), thumb(4, True))
    members, refused = as_unpaired(corpus, every(corpus))
    assert told(members) == [(0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 0, 1), (2, 1, 0), (3, 0, 1)]
    assert not refused
    assert members.sizes(corpus).tolist() == [2, 3, 2, 2, 3, 2]


def test_pairs_come_back_from_labelled_completions(corpus_of) -> None:
    """Paired to unpaired by the view, and back by `match`: the same texts stand side by side."""
    pairs = [pair(i, prompt=f"p{i % 3}") for i in range(7)]
    corpus = corpus_of(*pairs)
    members, _ = as_unpaired(corpus, every(corpus))
    texts = [(pairs[r].prompt, (pairs[r].rejected if s else pairs[r].chosen), bool(x)) for r, s, x in told(members)]
    thumbs = [Unpaired(p, t, x, Origin("g.jsonl", i)) for i, (p, t, x) in enumerate(texts)]
    back = corpus_of(*thumbs)
    matched, refused, alone = as_paired(back, every(back), match=True)
    assert (refused, alone) == ([], 0)
    found = [(thumbs[a].prompt, thumbs[a].completion, thumbs[b].completion) for a, b in matched.record.reshape(-1, 2)]
    assert sorted(found) == sorted((x.prompt, x.chosen, x.rejected) for x in pairs)
    assert matched.label.tolist() == [1, 0] * 7


def test_matching_takes_the_ith_of_both_sides_and_counts_the_rest(corpus_of) -> None:
    rows = [thumb(0, False, "a"), thumb(1, True, "a"), thumb(2, True, "b"), thumb(3, True, "a"), thumb(4, False, "a")]
    corpus = corpus_of(*rows, thumb(5, False, "a"), thumb(6, None, "b"))
    members, refused, alone = as_paired(corpus, every(corpus), match=True)
    assert members.record.tolist() == [1, 0, 3, 4], "the first good one before the first bad one, and so on"
    assert alone == 2, "row 2 has no bad one, row 5 no good one"
    assert [x.records.tolist() for x in refused] == [[6]]


@pytest.mark.parametrize("seed", [0, 1])
def test_one_member_of_a_pair_depends_on_seed_and_row_alone(seed: int, corpus_of) -> None:
    rows = [pair(i) for i in range(400)]
    corpus = corpus_of(*rows)
    one, _ = as_unpaired(corpus, every(corpus), members="one", seed=seed)
    assert one.record.tolist() == list(range(400))
    assert 160 < int((one.side == 1).sum()) < 240
    assert one.label[:8].tolist() == [[0, 1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0, 0]][seed], (
        "published runs saw these"
    )
    assert ((one.side == 1) == (one.label == 0)).all()
    again, _ = as_unpaired(corpus, np.arange(100, 200), members="one", seed=seed)
    assert (again.side == one.side[100:200]).all()
    other, _ = as_unpaired(corpus, every(corpus), members="one", seed=seed + 1)
    assert 100 < int((other.side != one.side).sum()) < 300


def test_views_refuse_what_they_cannot_read(corpus_of) -> None:
    corpus = corpus_of(thumb(1, None), pair(2), thumb(3, None, score=0.5), thumb(4, True))
    members, refused = as_unpaired(corpus, every(corpus))
    assert told(members) == [(1, 0, 1), (1, 1, 0), (3, 0, 1)]
    messages = [str(error) for refusal in refused for _, error in refusal.errors(corpus)]
    assert messages[0].startswith("f.jsonl:1: label: missing; expected true or false")
    assert messages[0].endswith("--model.objective SFT")
    assert messages[1].startswith("f.jsonl:3: label: missing")
    assert "PPOOffline with reward score" in messages[1]
    pairs, refused, _ = as_paired(corpus, every(corpus))
    assert told(pairs) == [(1, 0, 1), (1, 1, 0)]
    (refusal,) = refused
    assert refusal.records.tolist() == [0, 2, 3]
    assert "--model.objective KTO" in refusal.expected


def test_scores_stand_in_for_labels(corpus_of) -> None:
    rows: Sequence[Record] = [thumb(1, None, score=2.0), thumb(2, None, score=0.0), thumb(3, True, score=-1.0)]
    corpus = corpus_of(*rows, thumb(4, True), pair(5))
    members, refused = as_unpaired(corpus, every(corpus), scores=True)
    assert told(members) == [(0, 0, 1), (1, 0, 0), (2, 0, 1)]
    assert members.score.tolist() == [2.0, 0.0, -1.0]
    assert {int(r) for x in refused for r in x.records} == {3, 4}


def test_demonstrations_leave_out_what_is_undesirable(corpus_of) -> None:
    marks = [pair(6, demonstration="rejected"), pair(7, demonstration=None)]
    singles = [thumb(1, True), thumb(2, False), thumb(3, None), thumb(4, None, score=0.0), thumb(5, None, score=1.0)]
    corpus = corpus_of(*singles, *marks, pair(8))
    assert told(as_demonstrations(corpus, every(corpus))) == [(0, 0, 1), (2, 0, -1), (4, 0, -1), (5, 1, 1), (7, 0, 1)]


def test_a_file_of_mixed_kinds_names_the_rows_that_differ(corpus_of) -> None:
    corpus = corpus_of(thumb(1, True), pair(2), thumb(3, True))
    refusal = only_kind(corpus, every(corpus))
    assert refusal is not None
    assert [str(error) for _, error in refusal.errors(corpus)] == [
        "f.jsonl:2: chosen: a pair; expected rows of one kind in a file: this one begins with single completions"
    ]
    assert only_kind(corpus, np.array([0, 2])) is None


def test_every_turn_is_a_demonstration() -> None:
    said = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    prompt = [{"role": role, "content": content} for role, content in said]
    last = Unpaired(prompt, [{"role": "assistant", "content": "f"}], None, Origin("f", 1))
    found = [(len(x.prompt), x.completion[0]["content"]) for x in each_turn(last)]  # type: ignore[index]
    assert found == [(2, "b"), (4, "d"), (6, "f")]
    plain = thumb(1, True)
    assert each_turn(plain) == [plain]
