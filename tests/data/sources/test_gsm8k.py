"""Grade-school mathematics: solutions and attempts."""

from decimal import Decimal

import pytest

from halos_pl.data.records import DataError, Origin, parse_record
from halos_pl.data.sources import Source, read_rows
from halos_pl.data.sources.readers import gsm8k

ANSWER = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nTogether 48+24 = <<48+24=72>>72.\n#### 72"


def read(**row):
    ((_, found),) = gsm8k.read(iter([(Origin("a", 1), {"question": "How many?", **row})]))
    return found


def test_solutions_are_demonstrations_with_the_answer_beside():
    row = read(answer=ANSWER)
    assert row == {
        "prompt": [{"role": "user", "content": "How many?"}],
        "completion": [{"role": "assistant", "content": ANSWER}],
        "answer": ANSWER,
    }
    assert parse_record(row, Origin("a", 1)).desirable is None


@pytest.mark.parametrize("key", ["solution", "completion", "response"])
@pytest.mark.parametrize("verdict", ["correct", "is_correct"])
@pytest.mark.parametrize("said", [True, False, "no", 1])
def test_attempts_are_labelled_as_the_file_says(key, verdict, said):
    row = read(answer="72", **{key: "It is 72.", verdict: said})
    assert (row["completion"][0]["content"], row["label"], row["answer"]) == ("It is 72.", said, "72")
    assert parse_record(row, Origin("a", 1)).desirable is (said in (True, 1))


@pytest.mark.parametrize(
    ("solution", "right"),
    [
        ("so 72", True),
        ("#### 72", True),
        ("72 first, then\n#### 71", False),
        ("#### 72 apples, not 71", True),
        ("#### 1\n#### 72", True),
        ("We get 72 clips in 2 months", False),
        ("$72.00.", True),
        ("the answer is 72.0", True),
        ("72.5", False),
        ("172", False),
        ("-72", False),
        ("144 - 72 = 72", True),
        ("144-72", True),  # a minus between numbers is no sign
        ("no number", False),
        ("#### ", False),
        ("", False),
    ],
)
def test_attempts_are_compared_by_their_final_number(solution, right):
    assert read(answer=ANSWER, solution=solution)["label"] is right
    assert read(answer=72, solution=solution)["label"] is right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234,567.50", "1234567.5"),
        ("$1,234", "1234"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("#### -5", "-5"),
        ("costs .5", "0.5"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        ("(3)-4", "4"),
        ("x=-4", "-4"),
        ("000", "0"),
        ("\\boxed{18}", "18"),
        ("18!", "18"),
        ("- 5 apples", "5"),
        ("5\n-6", "-6"),
        ("٣ 7", "7"),
    ],
)
def test_final_numbers(text, number):
    assert gsm8k.final_number(text) == Decimal(number)


def test_rows_without_question_or_reference():
    ((_, error),) = gsm8k.read(iter([(Origin("a", 1), {"answer": "3"})]))
    assert str(error) == "a:1: question: missing, the row's keys are: answer; expected this key"
    assert "answer: missing" in str(read(solution="3"))
    assert "answer: no number in 'many'; expected a number to compare with, or `correct`" in str(
        read(answer="many", solution="3")
    )
    assert isinstance(read(), DataError)


def test_real_solutions_end_in_their_answers(shared_data):
    import json

    path = shared_data / "sft" / "gsm8k_train_2000.jsonl"
    rows = [json.loads(x) for x in path.read_text().splitlines()]
    for row in rows:
        assert gsm8k.final_number(row["messages"][-1]["content"]) == gsm8k.final_number(row["answer"])


def test_by_its_name(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2\\n#### 2"}\n')
    ((_, row),) = read_rows(Source(str(path), reader="gsm8k", split="test"))
    assert row["completion"] == [{"role": "assistant", "content": "2\n#### 2"}]
