"""What two readings of a source must share so that the tokens of one serve the other."""

from types import SimpleNamespace

import pytest

from halos_pl.data.records import DataError
from halos_pl.data.sources import Source, fingerprint, fingerprints


@pytest.fixture
def path(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    return tmp_path / "train.jsonl"


def test_it_is_of_content_and_place_does_not_count(path, tmp_path):
    before = fingerprint(Source(str(path)))
    assert len(before) == 32
    assert int(before, 16)
    assert fingerprint(Source(str(path))) == before
    (tmp_path / "other").mkdir()
    moved = path.rename(tmp_path / "other" / path.name)
    assert fingerprint(Source(str(moved))) == before
    moved.write_text('{"text": "b"}\n')
    assert fingerprint(Source(str(moved))) != before


def test_it_is_of_how_rows_are_read(path):
    options = [
        {},
        {"reader": "gsm8k"},
        {"split": "train"},
        {"columns": {"prompt": "text"}},
        {"columns": {"completion": "text"}},
        {"threshold": 0.5},
        {"threshold": [0.5, 0.6]},
    ]
    found = {fingerprint(Source(str(path), **x)) for x in options}
    assert len(found) == len(options)
    same = [{"limit": 5}, {"weight": 2.0}, {"columns": {}}]
    assert {fingerprint(Source(str(path), **x)) for x in same} == {fingerprint(Source(str(path)))}
    both = {"prompt": "a", "completion": "b"}
    turned = dict(reversed(both.items()))
    assert fingerprint(Source(str(path), columns=both)) == fingerprint(Source(str(path), columns=turned))
    assert fingerprint(Source(str(path), threshold=1)) == fingerprint(Source(str(path), threshold=[1.0]))


def test_of_a_folder_it_is_of_names_and_where_files_begin(path):
    folder = path.parent
    before = fingerprint(Source(str(folder)))
    (folder / "notes.txt").write_text("no data")
    assert fingerprint(Source(str(folder))) == before
    (folder / "b.jsonl").write_text("bc")
    (folder / "c.jsonl").write_text("d")
    one = fingerprint(Source(str(folder)))
    (folder / "b.jsonl").write_text("b")
    (folder / "c.jsonl").write_text("cd")
    other = fingerprint(Source(str(folder)))
    (folder / "b.jsonl").rename(folder / "a.jsonl")
    assert len({before, one, other, fingerprint(Source(str(folder)))}) == 4


def test_a_file_cannot_pass_for_two(tmp_path):
    for name, files in (("x", {"b": b"1\0c.jsonl2"}), ("y", {"b": b"1", "c": b"2"})):
        (tmp_path / name).mkdir()
        for stem, content in files.items():
            (tmp_path / name / f"{stem}.jsonl").write_bytes(content)
    assert fingerprint(Source(str(tmp_path / "x"))) != fingerprint(Source(str(tmp_path / "y")))


def test_generated_texts_and_what_ships_have_one():
    names = ["nano:stories", "nano:stories-held-out", "nano:thumbs"]
    assert len({fingerprint(Source(x)) for x in names}) == 3


@pytest.mark.parametrize("module", ["grammar", "wishes"])
def test_generated_texts_are_of_the_code_that_writes_them(path, monkeypatch, module):
    before = fingerprint(Source("nano:stories"))
    monkeypatch.setattr(fingerprints, module, SimpleNamespace(__file__=path))
    assert fingerprint(Source("nano:stories")) != before


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        fingerprint(Source(str(tmp_path / "a.jsonl")))
    import os

    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl: cannot be read: not a regular file"):
        fingerprint(Source(str(tmp_path / "a.jsonl")))
