"""Anthropic's Helpful-Harmless comparisons: two transcripts that differ in the last reply.

Rows have `chosen` and `rejected`, each a text of turns that begin after an empty line with `Human: ` or `Assistant: `
(https://huggingface.co/datasets/Anthropic/hh-rlhf). Turns are stripped and runs of spaces become one, as in the KTO
paper's code. A row whose histories differ, which ends with no reply or with an empty one, is refused: the comparison is
then of more than a reply. The published set has some; go on without them by `on_bad_row: skip`.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from halos_pl.data.records import Origin
from halos_pl.data.sources.readers.convert import Row, each, single_spaced, text

START = "\n\nHuman:"
ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):(?=\s|\Z)")


def pair(row: Row, origin: Origin) -> dict[str, Any]:
    """Prompt, chosen and rejected as messages."""
    chosen, rejected = (_turns(text(row, key, origin), key, origin) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
        wrong = f"another history than chosen's, from turn {same + 1} on"
        raise origin.error("rejected", wrong, "transcripts that differ in the last reply only")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.startswith(START)


def _turns(transcript: str, key: str, origin: Origin) -> list[dict[str, str]]:
    before, *parts = _TURN.split(transcript)
    expected = "turns that begin with '\\n\\nHuman: ' and '\\n\\nAssistant: '"
    if before.strip() or not parts:
        raise origin.error(key, f"{(before.strip() or transcript)[:40]!r} is in no turn", expected)
    turns = [
        {"role": ROLES[role], "content": single_spaced(content.strip())}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns[-1]["role"] != "assistant":
        raise origin.error(key, "no reply at the end", "the assistant's turn at last")
    if not turns[-1]["content"]:
        raise origin.error(key, "an empty reply at the end", "some text")
    if len(turns) < 2:
        raise origin.error(key, "a reply to nothing", expected)
    return turns


read = each(pair)
