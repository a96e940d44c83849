"""Compressed files, and files that change while they are read."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pytest

from halos_pl.data.records import DataError
from halos_pl.data.sources import Source, count_rows, fingerprint, read_rows

ROWS = [{"prompt": f"p{i}", "completion": "x" * (i % 50)} for i in range(3000)]
PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content).to_pybytes(),
}


def content(kind):
    if kind == ".json":
        return json.dumps(ROWS).encode()
    if kind == ".jsonl":
        return b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    separator = "," if kind == ".csv" else "\t"
    return "".join(f"{a}{separator}{b}\n" for a, b in [("prompt", "completion"), *map(dict.values, ROWS)]).encode()


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_every_format_may_be_packed(tmp_path, kind, pack):
    path = tmp_path / f"train{kind}{pack}"
    path.write_bytes(PACK[pack](content(kind)))
    assert [row for _, row in read_rows(str(path))] == ROWS
    assert [row for _, row in read_rows(str(path), "train")] == ROWS
    assert [row for _, row in read_rows(str(tmp_path))] == ROWS
    assert count_rows(Source(str(path))) == {".json": None, ".jsonl": 3000}.get(kind, 3001)


@pytest.mark.parametrize("pack", PACK)
def test_several_members_in_one_archive_are_read_on(tmp_path, pack):
    path = tmp_path / f"a.jsonl{pack.upper()}"
    path.write_bytes(PACK[pack](content(".jsonl")) + PACK[pack](content(".jsonl")))
    assert len(list(read_rows(str(path)))) == 6000


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("damage", ["cut", "cut at the last byte", "overwritten", "not packed", "rest"])
def test_damaged_archives_are_named(tmp_path, pack, damage):
    path = tmp_path / f"a.jsonl{pack}"
    whole = PACK[pack](content(".jsonl"))
    half = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:half],
            "cut at the last byte": whole[:-1],
            "overwritten": b"\0" * 20 + whole[20:],
            "not packed": content(".jsonl"),
            "rest": whole + b"and some more bytes",
        }[damage]
    )
    with pytest.raises(DataError, match=rf"^{path}: cannot be read"):
        list(read_rows(str(path)))
    if damage == "not packed":
        with pytest.raises(DataError, match=rf"^{path}: cannot be read"):
            count_rows(Source(str(path)))


@pytest.mark.parametrize("pack", PACK)
def test_a_damaged_second_member_is_no_end(tmp_path, pack):
    """As parallel packers write archives: what they hold must not be taken for less."""
    path = tmp_path / f"a.jsonl{pack}"
    member = PACK[pack](content(".jsonl"))
    path.write_bytes(member + b"?" + member[1:])
    with pytest.raises(DataError, match=rf"^{path}: cannot be read"):
        list(read_rows(str(path)))


def test_padding_and_members_cut_at_a_buffers_end(tmp_path, monkeypatch):
    monkeypatch.setattr("halos_pl.data.sources.archives.BLOCK", 64)
    for pack in (".xz", ".bz2"):
        path = tmp_path / f"a.jsonl{pack}"
        path.write_bytes(PACK[pack](content(".jsonl")) + b"\0" * 128 + PACK[pack](content(".jsonl")) + b"\0" * 64)
        assert len(list(read_rows(str(path)))) == 6000


@pytest.mark.parametrize("pack", PACK)
def test_empty_archives_have_no_rows(tmp_path, pack):
    path = tmp_path / f"a.jsonl{pack}"
    path.write_bytes(PACK[pack](b""))
    with pytest.raises(DataError, match="no rows in this file"):
        list(read_rows(str(path)))


def test_an_error_says_how_far_it_went(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(content(".jsonl") * 30)[:-20])
    with pytest.raises(DataError, match=r"cannot be read after row \d{5}: Compressed file ended"):
        list(read_rows(str(path)))


def test_a_file_is_read_up_to_its_size_at_opening(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content(".jsonl") * 30)  # larger than a buffer
    rows = read_rows(str(path))
    first = next(rows)
    with path.open("ab") as log:
        log.write(content(".jsonl") + b'{"prompt": "half a li')
    assert [row for _, row in [first, *rows]] == ROWS * 30


def test_a_file_that_becomes_shorter_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content(".jsonl") * 30)  # larger than a buffer
    rows = read_rows(str(path))
    next(rows)
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="the file became shorter while it was read"):
        list(rows)


def test_files_are_closed_where_reading_stops(tmp_path, recwarn):
    import gc
    import os

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(content(".jsonl")))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(5):
        rows = read_rows(str(path))
        next(rows)
        rows.close()
        fingerprint(Source(str(path)))
    gc.collect()
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after <= before
    assert not [x for x in recwarn if issubclass(x.category, ResourceWarning)]
