"""Grade-school mathematics: questions with worked solutions that end in `#### NUMBER`, and files of attempts at them.

Rows have `question` and `answer`, the solution to imitate (https://huggingface.co/datasets/openai/gsm8k, config main).
A row that has an attempt beside them, as `solution`, `completion` or `response`, is a labelled completion: desirable
where `correct` (or `is_correct`) says so, else where its final number is the answer's. The final number stands after
`####`, or is the last one of the text; thousands separators, dollar signs and zeros after the point do not count.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from halos_pl.data.records import Origin
from halos_pl.data.sources.readers.convert import Row, assistant, each, text, user

ATTEMPTS = ("solution", "completion", "response")
VERDICTS = ("correct", "is_correct")
MARK = "####"
_NUMBER = re.compile(r"((?<![\w)\]])-)?(?:\$(-)?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)


def solved(row: Row, origin: Origin) -> dict[str, Any]:
    """A demonstration, or an attempt with its label; the answer goes along for a verifier."""
    prompt = [user(text(row, "question", origin))]
    attempt = next((key for key in ATTEMPTS if row.get(key) is not None), None)
    if attempt is None:
        answer = text(row, "answer", origin)
        return {"prompt": prompt, "completion": [assistant(answer)], "answer": answer}
    verdict = next((key for key in VERDICTS if row.get(key) is not None), None)
    completion = text(row, attempt, origin)
    label = _is_right(row, completion, origin) if verdict is None else row[verdict]
    judged = {"prompt": prompt, "completion": [assistant(completion)], "label": label}
    return judged if row.get("answer") is None else {**judged, "answer": row["answer"]}


def final_number(solution: str) -> Decimal | None:
    """The number that a solution comes to; None where it has none."""
    _, mark, end = solution.rpartition(MARK)
    found = list(_NUMBER.finditer(end))
    if not found:
        return None
    minus, inner, digits = (found[0] if mark else found[-1]).groups()
    return Decimal(digits.replace(",", "")) * (-1 if minus or inner else 1)


def _is_right(row: Row, completion: str, origin: Origin) -> bool:
    value = row.get("answer")
    answer = str(value) if isinstance(value, int | float) else text(row, "answer", origin)
    if (expected := final_number(answer)) is None:
        raise origin.error("answer", f"no number in {answer[:40]!r}", "a number to compare with, or `correct`")
    return final_number(completion) == expected


read = each(solved)
