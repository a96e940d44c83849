"""What an objective sees of records."""

from collections import Counter

import pytest

from halos_pl.data.records import DataError, Origin, Paired, Unpaired
from halos_pl.data.views import as_demonstrations, as_paired, as_unpaired

HERE = Origin("rows.jsonl", 7)


def pairs(count):
    return [Paired(f"p{i}", f"w{i}", f"l{i}", Origin("f", i)) for i in range(count)]


def test_pairs_become_labelled_completions_side_by_side():
    labelled = Unpaired("q", "c", False, HERE)
    views = as_unpaired([*pairs(2), labelled], seed=0)
    assert [(x.prompt, x.completion, x.desirable) for x in views] == [
        ("p0", "w0", True),
        ("p0", "l0", False),
        ("p1", "w1", True),
        ("p1", "l1", False),
        ("q", "c", False),
    ]


def test_one_member_of_a_pair_depends_on_seed_and_row_alone():
    whole = as_unpaired(pairs(200), members="one", seed=3)
    assert as_unpaired(pairs(200)[50:], members="one", seed=3) == whole[50:]
    assert as_unpaired(pairs(200), members="one", seed=4) != whole
    assert 70 < Counter(x.desirable for x in whole)[True] < 130
    assert all(x.completion[0] == ("w" if x.desirable else "l") for x in whole)


def test_views_refuse_what_they_cannot_read():
    with pytest.raises(DataError, match=r"^rows.jsonl:7: label: missing; expected"):
        as_unpaired([Unpaired("q", "c", None, HERE)], seed=0)
    with pytest.raises(DataError, match=r"^rows.jsonl:7: chosen: missing; expected prompt\+chosen\+rejected"):
        as_paired([*pairs(1), Unpaired("q", "c", True, HERE)])
    assert as_paired(pairs(2)) == pairs(2)


def test_refusals_name_the_remedy():
    with pytest.raises(DataError, match=r"expected true or false.*, or .*--model\.objective SFT"):
        as_unpaired([Unpaired("q", "c", None, HERE)], seed=0)
    with pytest.raises(DataError, match=r"expected prompt\+chosen\+rejected.*, or .*--model\.objective KTO"):
        as_paired([Unpaired("q", "c", True, HERE)])


def test_scores_stand_in_for_labels():
    rows = [Unpaired("q", "c", None, HERE, score=score) for score in (0.5, 0.0, -1.0)]
    rows.append(Unpaired("q", "c", True, HERE, score=-1.0))
    assert [x.desirable for x in as_unpaired(rows, scores=True, seed=0)] == [True, False, False, True]
    with pytest.raises(DataError, match=r"^rows.jsonl:7: score: missing; expected a finite number"):
        as_unpaired([Unpaired("q", "c", True, HERE)], scores=True, seed=0)
    with pytest.raises(
        DataError, match=r"^f:0: score: a preference pair.*; expected rows of prompt, completion, score"
    ):
        as_unpaired(pairs(1), scores=True, seed=0)
    with pytest.raises(DataError, match=r"^rows.jsonl:7: label: missing"):
        as_unpaired(rows[:1], seed=0)


def test_demonstrations_leave_out_what_is_undesirable():
    labelled = [Unpaired("q", str(label), label, HERE) for label in (True, False, None)]
    assert [x.completion for x in as_demonstrations([*pairs(1), *labelled])] == ["w0", "True", "None"]
    scored = [Unpaired("q", str(score), None, HERE, score=score) for score in (0.5, 0.0, -1.0)]
    assert [x.completion for x in as_demonstrations(scored)] == ["0.5"]
