"""OpenAssistant's trees, rows of the true schema."""

import json
import warnings

import pytest

from halos_pl.data.records import DataError, DataWarning, Origin
from halos_pl.data.sources import Source, read_rows
from halos_pl.data.sources.readers import oasst


def message(name, parent, text, rank=None, **more):
    return {
        "message_id": name,
        "parent_id": parent,
        "user_id": "u",
        "created_date": "2023-02-05",
        "text": text,
        "role": "assistant" if name[0] == "a" else "prompter",
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "message_tree_id": "p1",
        **more,
    }


TREE = [
    message("p1", None, "What  is it?"),
    message("a1", "p1", "worst", 2),
    message("a2", "p1", "best  one", 0),
    message("a3", "p1", "middle", 1),
    message("p2", "a3", "And now?"),
    message("a4", "p2", "only", 0),
    message("p3", "a2", "Else?"),
    message("a5", "p3", "good", 0.0),
    message("a6", "p3", "bad", 1),
]


def read(rows):
    return list(oasst.read((Origin("a", i), x) for i, x in enumerate(rows, 1)))


def pairs(rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(rows)
    return [
        (
            o.row,
            [x["content"] for x in row["prompt"]],
            row["chosen"][0]["content"],
            row["rejected"][0]["content"],
            row["_demonstration"],
        )
        for o, row in found
    ]


def test_neighbours_in_rank_are_pairs_and_the_best_is_imitated_once():
    assert pairs(TREE) == [
        (4, ["What is it?"], "best one", "middle", "chosen"),
        (2, ["What is it?"], "middle", "worst", None),
        (9, ["What is it?", "best one", "Else?"], "good", "bad", "chosen"),
    ]
    roles = [x["role"] for x in read(TREE)[-1][1]["prompt"]]
    assert roles == ["user", "assistant", "user"]


def test_order_of_rows_does_not_matter_for_pairs():
    assert sorted(x[1:] for x in pairs(TREE[::-1])) == sorted(x[1:] for x in pairs(TREE))


@pytest.mark.parametrize("change", [{"lang": "de"}, {"deleted": True}, {"review_result": False}])
def test_what_is_left_out(change):
    def changed(name):
        return [{**x, **change} if x["message_id"] == name else x for x in TREE]

    assert [x[0] for x in pairs(changed("a3"))] == [9]  # ranks 0 and 2 are no neighbours
    assert [x[0] for x in pairs(changed("a2"))] == [2]  # and the thread through it ends
    assert pairs(changed("a2"))[0][-1] == "chosen"  # the best that is left
    assert pairs(changed("p1")) == []


def test_unreviewed_messages_and_those_without_a_language_stay():
    assert len(pairs([{**x, "review_result": None, "lang": None} for x in TREE])) == 3


def test_a_rank_that_is_not_a_number_is_none():
    """As pandas writes nulls."""
    assert pairs([{**x, "rank": float("nan") if x["rank"] is None else x["rank"]} for x in TREE]) == pairs(TREE)


def test_a_rank_beyond_floats_is_one():
    assert pairs([{**x, "rank": 10**400 if x["rank"] == 2 else x["rank"]} for x in TREE]) == pairs(
        [{**x, "rank": 3 if x["rank"] == 2 else x["rank"]} for x in TREE]
    )


def test_ranked_prompts_are_no_replies():
    rows = [TREE[0], TREE[2], message("p8", "a2", "x", 0), message("p9", "a2", "y", 1)]
    assert pairs(rows) == []


def test_two_of_one_rank_are_each_below_the_first_better_one():
    rows = [TREE[0], message("a1", "p1", "one", 0), message("a2", "p1", "two", 0), message("a3", "p1", "three", 1)]
    assert [(x[2], x[3]) for x in pairs(rows)] == [("one", "three")]


def test_orphans_are_left_out_with_a_note():
    with pytest.warns(DataWarning, match="1 messages are replied to but are in no row: what follows them is left out"):
        assert read(TREE[1:]) == []


def test_cycles_and_ids_that_stand_twice_are_refused():
    rows = [message("p1", "a0", "x"), message("a0", "p1", "y"), *TREE[1:4]]
    ((_, error),) = read(rows)
    assert str(error) == "a:2: parent_id: the thread comes back to 'p1'; expected a tree of messages"
    (_, error), *rest = read([*TREE, TREE[3]])
    assert str(error) == "a:10: message_id: 'a3' stands twice; expected ids that are unique"
    assert len(rest) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"role": "system"}, "role: got 'system' (str); expected prompter or assistant"),
        ({"parent_id": 3}, "parent_id: got 3"),
        ({"rank": 0.5}, "rank: got 0.5"),
        ({"rank": True}, "rank: got True"),
        ({"rank": "0"}, "rank: got '0'"),
        ({"rank": float("inf")}, "rank: got inf"),
        ({"text": None}, "text: missing"),
        ({"message_id": None}, "message_id: missing"),
    ],
)
def test_bad_rows_are_named(change, says):
    _, error = read([*TREE, {**message("a9", "p1", "x", 3), **change}])[0]
    assert isinstance(error, DataError)
    assert str(error).startswith(f"a:10: {says}")


def test_deep_threads(tmp_path):
    rows = [message("p0", None, "0")]
    for i in range(1, 3000):
        rows.append(message(f"{'ap'[i % 2 == 0]}{i}", f"{'ap'[i % 2]}{i - 1}", str(i), 0 if i % 2 else None))
    rows.append(message("a3000", f"p{2998}", "worse", 1))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    ((origin, row),) = read_rows(Source(str(path), reader="oasst"))
    assert (origin.row, len(row["prompt"])) == (3001, 2999)
