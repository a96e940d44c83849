"""UltraFeedback, binarized: the best of four models' replies against another one, as a judge model scored them.

Rows have `prompt`, and `chosen` and `rejected` as whole conversations that begin with it
(https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized; its splits for preferences are train_prefs and
test_prefs).
"""

from __future__ import annotations

from typing import Any

from halos_pl.data.records import Origin
from halos_pl.data.sources.readers.convert import Row, each, got, required


def pair(row: Row, origin: Origin) -> dict[str, Any]:
    chosen, rejected = (_conversation(row, key, origin) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise origin.error("rejected", "another history than chosen's", "conversations that differ in the last reply")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _conversation(row: Row, key: str, origin: Origin) -> list[Any]:
    value = required(row, key, origin)
    if not isinstance(value, list) or len(value) < 2:
        raise origin.error(key, f"got {got(value)}", "a conversation: a list of two messages or more")
    return value


read = each(pair)
