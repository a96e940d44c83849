"""What a user may ask for, and what is refused."""

import math

import pytest

from halos_pl.data.records import DataError
from halos_pl.data.sources import Source, as_sources, read_rows
from halos_pl.data.sources.readers import READERS
from halos_pl.data.sources.reading import resolve


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reader": "hh:helpfull"}, r"reader: 'hh:helpfull' \(did you mean 'hh:helpful'\?\); expected auto, hh"),
        ({}, "path: null, but the reader 'auto' has no hub dataset"),
        ({"reader": "llama-factory"}, "path: null, but the reader 'llama-factory' has no hub dataset"),
        ({"reader": "hh", "weight": 0}, "weight: 0; expected a number above 0"),
        ({"reader": "hh", "weight": -1.0}, "weight: -1.0"),
        ({"reader": "hh", "weight": math.nan}, "weight: nan"),
        ({"reader": "hh", "weight": math.inf}, "weight: inf"),
        ({"reader": "hh", "weight": 10**400}, "weight: 1000"),
        ({"reader": "hh", "limit": 2.5}, "limit: 2.5; expected at least 1"),
        ({"reader": "hh", "limit": 0}, "limit: 0; expected at least 1"),
        ({"reader": "hh", "limit": True}, "limit: True"),
        ({"reader": "hh", "threshold": math.nan}, "threshold: nan; expected a number, or two"),
        ({"reader": "hh", "threshold": math.inf}, "threshold: inf"),
        ({"reader": "hh", "threshold": 10**400}, "threshold: 1000"),
        ({"reader": "hh", "threshold": [0, -(10**400)]}, "threshold: "),
        ({"reader": "hh", "threshold": []}, r"threshold: \[\]"),
        ({"reader": "hh", "threshold": [1, 2, 3]}, r"threshold: \[1, 2, 3\]"),
        ({"reader": "hh", "threshold": [2, 1]}, r"threshold: \[2, 1\]; expected low < high"),
        ({"reader": "hh", "threshold": [1, 1]}, r"threshold: \[1, 1\]; expected low < high"),
        ({"reader": "hh", "threshold": True}, "threshold: True"),
        ({"path": "x", "columns": {"prompt": ""}}, "columns: prompt: ''; expected the name of a column"),
        ({"path": "x", "columns": {"promt": "q"}}, r"columns: 'promt' is no key of ours \(did you mean 'prompt'\?\)"),
        ({"path": "nano:thumbs", "streaming": True}, "streaming: true, but nano:thumbs is no hub dataset"),
    ],
)
def test_values_that_mean_nothing_are_refused(options, says):
    with pytest.raises(ValueError, match=rf"^{says}"):
        Source(**options)


def test_local_files_are_not_streamed(tmp_path):
    with pytest.raises(ValueError, match="is no hub dataset; local rows are never loaded whole"):
        Source(str(tmp_path), streaming=True)


def test_columns_of_a_verifier_are_anyones():
    assert Source("x", columns={"wish": "target"}).columns == {"wish": "target"}
    assert Source("x", reader="gsm8k", columns={"promt": "q"}).columns == {"promt": "q"}


def test_sources_are_hashable_and_have_a_name():
    one = Source("x", columns={"prompt": "q"}, threshold=[0, 1])
    assert {one: 1}[Source("x", columns={"prompt": "q"}, threshold=[0, 1])] == 1
    assert (one.name, str(Source(reader="hh"))) == ("x", "hh")
    assert one.bounds == (0, 1)
    assert Source("x", threshold=2).bounds == (2, 2)
    assert Source("x").bounds is None


def test_names_become_sources():
    assert as_sources(None) == []
    assert as_sources("a.jsonl") == [Source("a.jsonl")]
    assert as_sources("hh:helpful", "test") == [Source(reader="hh:helpful", split="test")]
    own = Source("b", split="dev")
    assert as_sources(["shp", own, Source("c")], "train") == [
        Source(reader="shp", split="train"),
        own,
        Source("c", split="train"),
    ]
    assert as_sources("events") == [Source("events")]  # no hub dataset of its own: a path


def test_what_lies_there_goes_before_a_readers_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert as_sources("hh") == [Source(reader="hh")]
    (tmp_path / "hh").mkdir()
    assert as_sources("hh") == [Source("hh")]


@pytest.mark.parametrize(
    ("source", "name", "arguments", "split"),
    [
        (Source(reader="hh"), "Anthropic/hh-rlhf", {}, None),
        (Source(reader="hh:helpful", split="test"), "Anthropic/hh-rlhf", {"data_dir": "helpful-base"}, "test"),
        (Source(reader="hh:harmless"), "Anthropic/hh-rlhf", {"data_dir": "harmless-base"}, None),
        (Source(reader="shp", split="validation"), "stanfordnlp/SHP", {}, "validation"),
        (Source(reader="oasst", split="test"), "OpenAssistant/oasst1", {}, "validation"),
        (Source(reader="oasst", split="train"), "OpenAssistant/oasst1", {}, "train"),
        (Source(reader="ultrafeedback"), "HuggingFaceH4/ultrafeedback_binarized", {}, "train_prefs"),
        (Source(reader="ultrafeedback", split="test"), "HuggingFaceH4/ultrafeedback_binarized", {}, "test_prefs"),
        (Source(reader="ultrafeedback", split="test_gen"), "HuggingFaceH4/ultrafeedback_binarized", {}, "test_gen"),
        (Source(reader="ultrachat", split="test"), "HuggingFaceH4/ultrachat_200k", {}, "test_sft"),
        (Source(reader="kto-mix"), "trl-lib/kto-mix-14k", {}, None),
        (Source(reader="gsm8k", split="test"), "openai/gsm8k", {"name": "main"}, "test"),
        (Source("me/copy@v1.0", reader="hh:helpful", split="x"), "me/copy", {"revision": "v1.0"}, "x"),
    ],
)
def test_readers_know_their_hub_datasets(source, name, arguments, split):
    place = resolve(source)
    assert (place.name, place.arguments, place.split) == (name, arguments, split)
    assert resolve(Source("me/copy", streaming=True)).streaming


@pytest.mark.parametrize(
    "name",
    [
        "https://hf.co/a/b",
        "hf://datasets/a/b",
        "a\\b",
        "a..b",
        "a/..b",
        "a b",
        "a/b@",
        "a/b@x/y",
        "-a/b",
        "a/b c",
        "ä/b",
    ],
)
def test_what_no_hub_dataset_can_be_called(name):
    with pytest.raises(DataError, match=r"neither a local file or folder nor a name of a hub dataset|no such file"):
        read_rows(name)


def test_every_reader_is_told_in_the_help_and_has_a_line_about_it():
    documented = Source.__doc__.split("reader: ")[1].split("split: ")[0]
    for name, recipe in READERS.items():
        assert name in documented.replace("\n", " ")
        assert recipe.about
        assert "\n" not in recipe.about


def test_generated_texts_have_no_splits():
    origin, row = next(read_rows("nano:stories"))
    assert str(origin) == "nano:stories:1"
    assert row
    with pytest.raises(DataError, match="a generated text has no splits, and 'train' was asked for"):
        read_rows(Source("nano:stories", split="train"))
    with pytest.raises(DataError, match="nothing of that name ships here; did you mean nano:thumbs"):
        read_rows("nano:thumb")
