"""Labels and scores: what counts as a thumbs-up, as a thumbs-down, or as a reward.

| meaning     | values        | words, in any case, with spaces around them                                          |
|-------------|---------------|--------------------------------------------------------------------------------------|
| desirable   | true, 1, 1.0  | `true`, `t`, `yes`, `y`, `1`, `1.0`, `up`, `thumbs_up`, `thumbs-up`, `thumbs up`,    |
|             |               | `👍`, `good`, `like`, `positive`, `desirable`, `chosen`, `accept`, `accepted`        |
| undesirable | false, 0, 0.0 | `false`, `f`, `no`, `n`, `0`, `0.0`, `down`, `thumbs_down`, `thumbs-down`,           |
|             |               | `thumbs down`, `👎`, `bad`, `dislike`, `negative`, `undesirable`, `rejected`,        |
|             |               | `reject`                                                                             |

A thumb may have any skin tone. Nothing else is a label: a number on another scale, such as -1 or a count of stars, is
a `score`, and null is no demonstration.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halos_pl.data.records import Origin

MAX_SCORE = 1e6  # a larger reward only destroys weights
EXPECTED = "true or false (or 1/0, yes/no, up/down, 👍/👎, good/bad, like/dislike, chosen/rejected and the like)"
_UP = "true,t,yes,y,1,1.0,up,thumbs_up,thumbs-up,thumbs up,👍,good,like,positive,desirable,chosen,accept,accepted"
_DOWN = (
    "false,f,no,n,0,0.0,down,thumbs_down,thumbs-down,thumbs down,👎,bad,dislike,negative,undesirable,rejected,reject"
)
LABELS = dict.fromkeys(_UP.split(","), True) | dict.fromkeys(_DOWN.split(","), False)
_WORDS = [x for x in LABELS if sum(map(str.isalpha, x)) > 2]  # a hint at a number or a letter would be a guess
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_SHADES = dict.fromkeys([0xFE0F, *range(0x1F3FB, 0x1F400)])  # of an emoji: its colour variant, its skin tones


def parse_label(value: object, origin: Origin) -> bool:
    """Whether a `label` means desirable; DataError for what the table above lacks."""
    if isinstance(value, bool):
        return value
    expected = EXPECTED
    if isinstance(value, str):
        word = value.strip().lower()
        if (parsed := LABELS.get(word if word.isascii() else word.translate(_SHADES))) is not None:
            return parsed
        other_scale = _NUMBER.fullmatch(word) is not None
    elif (other_scale := isinstance(value, int | float)) and value in (0, 1):
        return bool(value)
    if other_scale:
        expected += "; another scale is read as `score`, and a threshold makes labels of it"
    raise origin.got("label", value, expected, near=_WORDS)


def parse_score(value: object, origin: Origin) -> float | None:
    """A reward; None where there is none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_SCORE:
        raise origin.got("score", value, f"a number within ±{MAX_SCORE:,.0f}")
    return float(value)


@lru_cache(maxsize=1024)
def misspelt(keys: tuple[str, ...]) -> bool:
    """Whether one of a row's keys looks like a misspelt `label`: such a row must not become a demonstration."""
    return bool(get_close_matches("label", keys, n=1, cutoff=0.8))
