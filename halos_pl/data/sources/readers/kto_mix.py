"""TRL's mix for KTO: replies of two preference sets, each with a thumbs-up or a thumbs-down.

Rows have `prompt` and `completion` as messages, and `label` (https://huggingface.co/datasets/trl-lib/kto-mix-14k). They
are in our schema as they are; a row without a label is refused.
"""

from __future__ import annotations

from typing import Any

from halos_pl.data.records import Origin
from halos_pl.data.sources.readers.convert import Row, each, required


def judged(row: Row, origin: Origin) -> dict[str, Any]:
    return {key: required(row, key, origin) for key in ("prompt", "completion", "label")}


read = each(judged)
