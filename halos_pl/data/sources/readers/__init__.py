"""Readers: how the rows of published datasets become rows of ours, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from halos_pl.data.records import DataError
from halos_pl.data.sources.readers import (
    auto,
    gsm8k,
    hh,
    kto_mix,
    llama_factory,
    oasst,
    shp,
    ultrachat,
    ultrafeedback,
)
from halos_pl.data.sources.rows import Rows, parsed


@dataclass(frozen=True)
class Recipe:
    """A kind of data.

    Args:
        about: what it is, in a line.
        read: rows of the dataset's schema to rows of ours.
        held_out: the same for splits other than train, where they are read otherwise.
        hub: the hub dataset that it is made for.
        config: of several that the hub dataset has.
        data_dir: a folder of the hub dataset.
        splits: our names of splits -> the dataset's; others are the same.
    """

    about: str
    read: Callable[[Rows], Rows]
    held_out: Callable[[Rows], Rows] | None = None
    hub: str | None = None
    config: str | None = None
    data_dir: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)


def _events(rows: Rows) -> Rows:
    from halos_pl.data.sources import events

    return events.read((origin, row) for origin, line in rows if not _is_torn(row := parsed(line, origin), line))


def _is_torn(row: object, line: object) -> bool:
    """Whether a line is one that a service has not yet written to its end."""
    return isinstance(row, DataError) and isinstance(line, bytes) and not line.endswith(b"\n")


HH = "Anthropic/hh-rlhf"
READERS: dict[str, Recipe] = {
    "auto": Recipe(
        "our schemas, Anthropic-HH transcripts and LLaMA-Factory's rows, told apart file by file", auto.read
    ),
    "hh": Recipe("pairs of helpful and of harmless replies", hh.read, hub=HH),
    "hh:helpful": Recipe("pairs of helpful replies", hh.read, hub=HH, data_dir="helpful-base"),
    "hh:harmless": Recipe("pairs of harmless replies", hh.read, hub=HH, data_dir="harmless-base"),
    "shp": Recipe("pairs of Reddit comments", shp.read, held_out=shp.read_held_out, hub="stanfordnlp/SHP"),
    "oasst": Recipe(
        "pairs of ranked replies in English", oasst.read, hub="OpenAssistant/oasst1", splits={"test": "validation"}
    ),
    "ultrafeedback": Recipe(
        "pairs of models' replies that a model judged",
        ultrafeedback.read,
        hub="HuggingFaceH4/ultrafeedback_binarized",
        splits={"train": "train_prefs", "test": "test_prefs"},
    ),
    "ultrachat": Recipe(
        "conversations to imitate",
        ultrachat.read,
        hub="HuggingFaceH4/ultrachat_200k",
        splits={"train": "train_sft", "test": "test_sft"},
    ),
    "kto-mix": Recipe("replies with a thumbs-up or a thumbs-down", kto_mix.read, hub="trl-lib/kto-mix-14k"),
    "gsm8k": Recipe("solutions to imitate, or attempts, right or wrong", gsm8k.read, hub="openai/gsm8k", config="main"),
    "llama-factory": Recipe("rows of LLaMA-Factory, Alpaca's or ShareGPT's", llama_factory.read),
    "events": Recipe("a log of feedback that a service appends to", _events),
}
