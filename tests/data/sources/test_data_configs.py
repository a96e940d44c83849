"""The data fragments that ship: what they say is what their readers can do."""

from pathlib import Path

import pytest
import yaml

from halos_pl.config_files import shipped_configs
from halos_pl.data.sources import Source
from halos_pl.data.sources.hub import Place
from halos_pl.data.sources.readers import READERS
from halos_pl.data.sources.reading import resolve

FRAGMENTS = sorted((Path(shipped_configs()) / "data").glob("*.yaml"))
SPLITS = {  # of the hub datasets, by their cards
    "Anthropic/hh-rlhf": {"train", "test"},
    "stanfordnlp/SHP": {"train", "validation", "test"},
    "OpenAssistant/oasst1": {"train", "validation"},
    "HuggingFaceH4/ultrafeedback_binarized": {"train_prefs", "test_prefs"},
    "HuggingFaceH4/ultrachat_200k": {"train_sft", "test_sft"},
    "trl-lib/kto-mix-14k": {"train", "test"},
    "openai/gsm8k": {"train", "test"},
}


def test_every_reader_with_a_hub_dataset_has_a_fragment():
    hub = {name.replace(":", "-") for name, recipe in READERS.items() if recipe.hub}
    assert {x.stem for x in FRAGMENTS} == hub


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda x: x.stem)
def test_fragments_are_sources_of_splits_that_there_are(path):
    content = path.read_bytes()
    assert content.isascii()
    assert b"{path: COPY, reader: " in content
    data = yaml.safe_load(content)["data"]
    assert set(data) <= {"train", "validation", "on_bad_row"}
    places = [resolve(Source(**data[key])) for key in ("train", "validation")]
    for place in places:
        assert isinstance(place, Place)
        assert place.split in SPLITS[place.name]
    assert places[0].split != places[1].split
    assert {Source(**data[key]).reader.replace(":", "-") for key in ("train", "validation")} == {path.stem}
