import math
import re
import time
from decimal import Decimal

import numpy as np
import pytest

from halos_pl.data import labels
from halos_pl.data.records import DataError, Origin, parse_record

HERE = Origin("rows.jsonl", 7)
EXPECTED = "; expected true or false (or 1/0, yes/no, "
OTHER_SCALE = "another scale is read as `score`, and a threshold makes labels of it"
UP = [
    "true",
    "1",
    "1.0",
    "yes",
    "y",
    "t",
    "up",
    "thumbs_up",
    "thumbs up",
    "thumbs-up",
    "👍",
    "good",
    "like",
    "positive",
]
UP += ["desirable", "chosen", "accept", "accepted"]
DOWN = [
    "false",
    "0",
    "0.0",
    "no",
    "n",
    "f",
    "down",
    "thumbs_down",
    "thumbs down",
    "thumbs-down",
    "👎",
    "bad",
    "dislike",
]
DOWN += ["negative", "undesirable", "rejected", "reject"]


def meaning(label):
    return parse_record({"prompt": "a", "completion": "b", "label": label}, HERE).desirable


@pytest.mark.parametrize("label", [True, 1, 1.0, np.float64(1), *UP, "TRUE", " Thumbs_Up\n", "👍🏽", "👍\ufe0f"])
def test_labels_that_mean_desirable(label):
    assert meaning(label) is True


@pytest.mark.parametrize("label", [False, 0, 0.0, -0.0, *DOWN, "\tNo ", "F", "👎🏿"])
def test_labels_that_mean_undesirable(label):
    assert meaning(label) is False


def test_the_table_in_the_docstring_is_the_table():
    up, down = re.split(r"\| undesirable \|", labels.__doc__.split("A thumb may")[0])
    assert re.findall(r"`(.+?)`", up) == [word for word, meaning in labels.LABELS.items() if meaning]
    assert re.findall(r"`(.+?)`", down) == [word for word, meaning in labels.LABELS.items() if not meaning]
    assert sorted(labels.LABELS) == sorted(UP + DOWN)


def refusal(label):
    with pytest.raises(DataError) as error:
        meaning(label)
    message = str(error.value)
    assert message.startswith("rows.jsonl:7: label: got ")
    assert EXPECTED in message
    assert "\n" not in message
    assert error.value.origin == HERE
    return message


@pytest.mark.parametrize(
    "label",
    [
        *(
            None,
            "",
            " ",
            "maybe",
            "none",
            "nope",
            "null",
            "nan",
            "ok",
            "+",
            "👍👎",
            "🙂",
            "true false",
            "unknown",
            "neutral",
        ),
        *([True], [], {}, {"value": True}, (1,), 1j, Decimal(1), b"true"),
        *(np.bool_(True), np.int64(1), np.float32(1), np.array(1), np.array([1, 0]), np.array([[1, 0], [0, 1]])),
    ],
    ids=repr,
)
def test_what_may_be_mistaken_is_refused(label):
    message = refusal(label)
    assert "did you mean" not in message
    assert "score" not in message


@pytest.mark.parametrize(
    "label",
    [-1, 2, 0.5, 5, -1.0, math.nan, math.inf, 10**400, "-1", "+1", "2", "0.5", ".5", "-1.0", " 10 ", "5."],
    ids=str,
)
def test_another_scale_is_sent_to_score(label):
    message = refusal(label)
    assert message.endswith(OTHER_SCALE)
    assert "did you mean" not in message


def test_a_long_text_takes_no_time():
    start = time.process_time()
    refusal("1" * 100_000 + "x")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("label", "meant"),
    [("ture", "true"), ("Flase", "false"), ("thumb_up", "thumbs_up"), ("thumbsdown", "thumbs_down"), ("liked", "like")],
)
def test_a_misspelt_word_is_guessed_but_not_taken(label, meant):
    assert f"got '{label}' (str) (did you mean '{meant}'?){EXPECTED}" in refusal(label)


@pytest.mark.parametrize("key", ["labels", "Label", "lable", "labell", "label_"])
def test_a_misspelt_key_is_no_demonstration(key):
    with pytest.raises(
        DataError, match=rf"^rows.jsonl:7: label: missing \(did you mean '{key}'\?\), the row's keys are"
    ):
        parse_record({"prompt": "a", "completion": "b", key: True}, HERE)


def test_another_key_beside_a_label_or_far_from_it_is_no_matter():
    row = {"prompt": "a", "completion": "b", 3: "c", "table": True, "level": 2}
    assert parse_record(row, HERE).desirable is None
    assert parse_record(row | {"labels": 1, "label": False}, HERE).desirable is False


def test_the_keys_of_a_million_rows_are_compared_once():
    labels.misspelt.cache_clear()
    for i in range(50):
        parse_record({"prompt": str(i), "completion": "b", "uid": i}, HERE)
    assert labels.misspelt.cache_info().misses == 1


@pytest.mark.parametrize(("score", "number"), [(None, None), (0, 0.0), (-2, -2.0), (1e6, 1e6), (np.float64(0.5), 0.5)])
def test_scores(score, number):
    assert labels.parse_score(score, HERE) == number


@pytest.mark.parametrize(
    "score", [True, "0.5", [1], math.nan, -math.inf, 10**400, 1e39, -1_000_001, np.int64(1)], ids=repr
)
def test_a_score_is_a_number_that_weights_survive(score):
    with pytest.raises(DataError, match=r"^rows.jsonl:7: score: got .*; expected a number within ±1,000,000$"):
        labels.parse_score(score, HERE)
