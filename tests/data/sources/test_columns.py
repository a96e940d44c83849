"""Columns under our names, and labels made of scores."""

import json

import pytest

from halos_pl.data.records import DataError
from halos_pl.data.sources import Source, load_records, read_rows


def source(path, rows, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path), **options)


def test_columns_take_our_names_and_the_rest_stays(tmp_path):
    rows = [{"question": "q", "prompt": "other", "answer": "a", "id": 3}]
    one = source(tmp_path / "a.jsonl", rows, columns={"prompt": "question", "completion": "answer"})
    assert [row for _, row in read_rows(one)] == [{"id": 3, "prompt": "q", "completion": "a"}]
    swapped = source(
        tmp_path / "b.jsonl", [{"chosen": "x", "rejected": "y"}], columns={"chosen": "rejected", "rejected": "chosen"}
    )
    assert [row for _, row in read_rows(swapped)] == [{"chosen": "y", "rejected": "x"}]


def test_a_row_without_the_column_is_named(tmp_path):
    rows = [{"question": "q", "completion": "a"}, {"query": "q", "completion": "a"}, 3, {"k" * 99: 1}]
    one = source(tmp_path / "a.jsonl", rows, columns={"prompt": "question"})
    first, second, third, *rest = (row for _, row in read_rows(one))
    assert first == {"prompt": "q", "completion": "a"}
    assert str(second) == (
        f"{tmp_path / 'a.jsonl'}:2: question: no such column, the row's keys are: query, completion; "
        "expected the columns question"
    )
    assert third == 3
    assert f"the row's keys are: {'k' * 40}…; expected" in str(rest[0])


def test_columns_go_before_the_reader_and_name_the_split(tmp_path):
    rows = [{"q": "1+1?", "a": "2\n#### 2", "part": x} for x in ("train", "test")]
    one = source(
        tmp_path / "x.jsonl",
        rows,
        reader="gsm8k",
        split="test",
        columns={"question": "q", "answer": "a", "split": "part"},
    )
    ((origin, row),) = read_rows(one)
    assert origin.row == 2
    assert row["prompt"] == [{"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize(
    ("threshold", "labels"),
    [
        (0.5, [False, False, True, True]),
        ([0.5], [False, False, True, True]),
        (0, [False, True, True, True]),
        ([0, 1], [False, None, None, True]),
        ([0.5, 0.75], [False, False, True, True]),
    ],
)
def test_thresholds_make_labels_of_scores(tmp_path, threshold, labels):
    rows = [{"prompt": "p", "completion": str(x), "score": x, "label": False} for x in (0, 0.5, 0.75, 1)]
    records = load_records(source(tmp_path / "a.jsonl", rows, threshold=threshold)).records
    expected = [(str(x), label) for x, label in zip((0, 0.5, 0.75, 1), labels, strict=True) if label is not None]
    assert [(x.completion, x.desirable) for x in records] == expected


@pytest.mark.parametrize("score", [None, "0.5", True, [1]])
def test_a_threshold_needs_scores(tmp_path, score):
    row = {"prompt": "p", "completion": "c", "score": score}
    ((_, error),) = read_rows(source(tmp_path / "a.jsonl", [row], threshold=0.5))
    assert (
        f"{tmp_path / 'a.jsonl'}:1: score: got {score!r} ({type(score).__name__}); expected a number in every row"
        in str(error)
    )
    ((_, error),) = read_rows(source(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}], threshold=0.5))
    assert "score: missing; expected a number in every row" in str(error)


def test_a_score_beyond_floats_is_above_every_threshold_and_left_to_be_refused(tmp_path):
    row = {"prompt": "p", "completion": "c", "score": 10**400}
    one = source(tmp_path / "a.jsonl", [row], threshold=0.5)
    assert [row["label"] for _, row in read_rows(one)] == [True]
    with pytest.raises(DataError, match=r"a.jsonl:1: score: got 10{17}\.\.\.0{19} \(int\); expected a number within"):
        load_records(one)


def test_a_cell_that_is_no_number_has_no_label(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,score\np,c,nan\np,d,inf\np,e,0.7\n")
    nan, infinite, good = (row for _, row in read_rows(Source(str(path), threshold=0.5)))
    assert isinstance(nan, DataError)
    assert infinite["label"] is True  # the record's parser refuses the score
    assert good == {"prompt": "p", "completion": "e", "score": 0.7, "label": True}


def test_nothing_left_is_an_error(tmp_path):
    rows = [{"prompt": "p", "completion": "c", "score": 0.5}]
    with pytest.raises(DataError, match="no row can be used"):
        load_records(source(tmp_path / "a.jsonl", rows, threshold=[0, 1]))
