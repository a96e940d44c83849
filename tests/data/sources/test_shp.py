"""Stanford Human Preferences, rows of the true schema."""

import json
import math

import pytest

from halos_pl.data.records import DataError, Origin
from halos_pl.data.sources import Source, read_rows
from halos_pl.data.sources.readers import shp


def row(history, first, second, scores, label=None, **more):
    return {
        "post_id": "x",
        "domain": "askbaking_train",
        "upvote_ratio": 0.98,
        "history": history,
        "c_root_id_A": "a",
        "c_root_id_B": "b",
        "created_at_utc_A": 1,
        "created_at_utc_B": 2,
        "score_A": scores[0],
        "score_B": scores[1],
        "human_ref_A": first,
        "human_ref_B": second,
        "labels": int(scores[0] > scores[1]) if label is None else label,
        "seconds_difference": 1.0,
        "score_ratio": 2.0,
        **more,
    }


def pairs(rows, read=shp.read):
    """Line, prompt, chosen, rejected, mark."""
    found = read((Origin("a", i), x) for i, x in enumerate(rows, 1))
    return [
        (o.row, *(x[key][0]["content"] for key in ("prompt", "chosen", "rejected")), x["_demonstration"])
        for o, x in found
    ]


ROWS = [
    row("post  one", "a", "b", (10, 5)),
    row("post  one", "c", "d", (5, 9)),  # 1.8 times
    row("post two", "e", "f", (2, 40)),
    row("post  one", "g", "h", (1, 2)),
]


def test_training_pairs_are_of_twice_the_score():
    assert pairs(ROWS) == [
        (1, "post one", "a", "b", "chosen"),
        (3, "post two", "f", "e", "rejected"),
        (4, "post one", "h", "g", None),
    ]


def test_held_out_pairs_are_all():
    assert [(x[0], x[4]) for x in pairs(ROWS, shp.read_held_out)] == [
        (1, "chosen"),
        (2, None),
        (3, "rejected"),
        (4, None),
    ]


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ((4, 2), True),
        ((3, 2), False),
        ((1, 0), True),
        ((0, 0), False),
        ((3, -2), True),
        ((-1, -8), False),
        ((7, 7), False),
        ((10**400, 3), True),
        ((10**400, 0.5), True),
        ((10**400, 10**400 - 1), False),
        ((math.inf, math.inf), False),
        ((199, 100), False),
    ],
)
def test_scores_that_are_not_above_zero(scores, kept):
    assert len(pairs([row("h", "a", "b", scores)])) == kept


def test_at_most_five_pairs_of_a_post_the_same_every_time():
    many = [row("h", f"a{i}", f"b{i}", (9, 1)) for i in range(12)]
    drawn = pairs(many)
    assert len(drawn) == 5
    assert [x[0] for x in drawn] == sorted(x[0] for x in drawn)
    assert pairs(many) == drawn
    others = [row("other", "x", "y", (9, 1))] * 3
    assert [x[0] - 3 for x in pairs([*others, *many]) if x[1] == "h"] == [x[0] for x in drawn]
    assert len({tuple(x[0] for x in pairs([{**x, "history": f"h{k}"} for x in many])) for k in range(20)}) > 10
    assert len(pairs(many[:5])) == 5
    assert len(pairs(many, shp.read_held_out)) == 12


def test_sft_imitates_the_first_comment_where_a_drawn_pair_has_it():
    many = [row("h", "first" if i in (0, 9) else f"a{i}", f"b{i}", (1, 9)) for i in range(40)]
    for start in range(40):
        turned = [many[0], *many[start:], *many[1:start]]
        drawn = pairs(turned)
        marked = [x for x in drawn if x[4] is not None]
        assert len(marked) == 1
        if any("first" in x for x in drawn):
            assert marked[0][3] == "first"
            assert marked[0][4] == "rejected"
        else:
            assert marked[0] == drawn[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": 2}, "labels: got 2 (int); expected 1 where A is preferred"),
        ({"labels": "1"}, "labels: got '1'"),
        ({"labels": None}, "labels: missing"),
        ({"score_B": "3"}, "score_A and score_B: got '3' (str); expected numbers"),
        ({"score_A": float("nan")}, "score_A and score_B: got nan"),
        ({"history": 3}, "history: got 3"),
    ],
)
def test_bad_rows_are_named_in_their_place(change, says):
    for read in (shp.read, shp.read_held_out):
        first, second = read(iter([(Origin("a", 1), {**ROWS[0], **change}), (Origin("a", 2), ROWS[0])]))
        assert isinstance(first[1], DataError)
        assert str(first[1]).startswith(f"a:1: {says}")
        assert second[1]["_demonstration"] == "chosen"


def test_the_split_decides_by_its_name_or_the_files(tmp_path):
    content = "".join(json.dumps(x) + "\n" for x in ROWS)
    for name, split, count in (
        ("train.json", None, 3),
        ("train.json", "train", 3),
        ("validation.json", None, 4),
        ("test.jsonl", "test", 4),
        ("askbaking.jsonl", None, 3),
    ):
        (tmp_path / name).write_text(content)
        assert len(list(read_rows(Source(str(tmp_path / name), reader="shp", split=split)))) == count


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[1]))
    with pytest.raises(DataError, match=r"a.jsonl: the reader 'shp' finds nothing to learn from in its rows"):
        list(read_rows(Source(str(tmp_path / "a.jsonl"), reader="shp")))
