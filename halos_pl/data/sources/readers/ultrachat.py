"""UltraChat 200k: conversations of two models, several turns long, to imitate.

Rows have `prompt`, which is the first turn, and `messages`, which has them all
(https://huggingface.co/datasets/HuggingFaceH4/ultrachat_200k; its splits for SFT are train_sft and test_sft).
"""

from __future__ import annotations

from typing import Any

from halos_pl.data.records import Origin
from halos_pl.data.sources.readers.convert import Row, each, required


def conversation(row: Row, origin: Origin) -> dict[str, Any]:
    return {"messages": required(row, "messages", origin)}


read = each(conversation)
