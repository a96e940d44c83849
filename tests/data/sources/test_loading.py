"""Records of whole sources: files, folders, lists, splits, bad rows."""

import json
import os
import warnings
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halos_pl.data.records import DataError, DataWarning, Paired, Unpaired
from halos_pl.data.sources import Source, load_records, read_rows

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}", "label": i % 2 == 0} for i in range(4)]


def written(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def prompts(spec, split=None, **options):
    return [record.prompt for record in load_records(spec, split, **options).records]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path, name):
    loaded = load_records(str(written(tmp_path / name, ROWS)))
    assert [(x.prompt, x.completion, x.desirable, x.origin.row) for x in loaded.records] == [
        (f"p{i}", f"c{i}", i % 2 == 0, i + 1) for i in range(4)
    ]
    assert loaded.records[0].origin.file.endswith(name)
    assert loaded.bad == []


def test_folders_and_lists_are_read_in_order(tmp_path):
    written(tmp_path / "b.jsonl", ROWS[2:])
    written(tmp_path / "a.parquet", ROWS[:2])
    (tmp_path / "notes.txt").write_text("not data")
    assert prompts(str(tmp_path)) == ["p0", "p1", "p2", "p3"]
    assert prompts([str(tmp_path / "b.jsonl"), str(tmp_path / "a.parquet")]) == ["p2", "p3", "p0", "p1"]


def test_jsonl_takes_bom_crlf_and_blank_lines_and_counts_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r\n\r\n" + json.dumps(ROWS[1]).encode())
    assert [x.origin.row for x in load_records(str(path)).records] == [1, 3]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "a" "completion": "b"}', "column 16: Expecting ',' delimiter; expected one JSON object"),
        (b'{"prompt": "a\0b", "completion": "c"}', "column 14: Invalid control character"),
        (b'{"prompt": "\xff", "completion": "c"}', "byte 13: not UTF-8"),
        (b"[" * 100_000, "expected one JSON object a line"),
        (b'{"prompt": "a", "completion": "b", "label": true, "label": false}', "the key 'label' stands twice"),
        (b'{"prompt": "a", "completion": "b", "meta": [{"x": 1, "x": 1}]}', "the key 'x' stands twice in one object"),
        (b'{"prompt": "a", "completion": "b", "score": NaN}', "NaN is no JSON number"),
        (b'{"prompt": "a", "completion": "b", "score": -Infinity}', "-Infinity is no JSON number"),
        (b'{"prompt": "a", "completion": "b"', "column 34: Expecting ',' delimiter"),
        (b"3", "the row is 3 (int); expected an object"),
        (b'{"prompt": "a", "completion": ""}', "completion: an empty completion"),
    ],
)
def test_bad_lines_are_named_and_can_be_skipped(tmp_path, line, says):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([json.dumps(ROWS[0]).encode(), line, json.dumps(ROWS[1]).encode()]))
    with pytest.raises(DataError) as error:
        load_records(str(path))
    assert f"\n  {path}:2: " in str(error.value)
    assert says in str(error.value)
    assert "--data.on_bad_row skip" in str(error.value)
    loaded = load_records(str(path), on_bad_row="skip")
    assert [x.prompt for x in loaded.records] == ["p0", "p1"]
    assert len(loaded.bad) == 1
    assert loaded.bad[0].startswith(f"{path}:2: ")


def test_errors_stop_at_ten_rows(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"txt": "x"}] * 30)
    with pytest.raises(DataError) as error:
        load_records(str(path))
    assert "prompt: missing" in str(error.value)
    assert str(error.value).startswith("the first 10 bad rows:")
    with pytest.raises(DataError, match=r"no row can be used; all 30 are bad, the first: .*a.jsonl:1: prompt"):
        load_records(str(path), on_bad_row="skip")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", "no rows in this file"),
        ("a.jsonl", b"\n \n", "no rows in this file"),
        ("a.json", b"[]", "no rows in this file"),
        ("a.json", b'{"data": []}', "the top level is a dict; expected an array of objects"),
        ("a.json", b'{\n"data": []}', "the top level is a dict; expected an array of objects"),
        ("a.json", b'[{"a": 1}\n', "not JSON: .*; with one object a line, name the file .jsonl"),
        ("a.json", b'[{"a": 1, "a": 2}]', "the key 'a' stands twice"),
        ("a.json", b"", "no rows in this file"),
        ("a.json", b'["\xff"]', "not JSON: 'utf-8' codec"),
        ("a.parquet", b"PAR1 but not really", "not Parquet"),
        ("a.parquet", b"", "not Parquet"),
        ("a.toml", b"a = 1\n", "unknown kind of file '.toml'; expected .jsonl, .json, .parquet, .csv, .tsv"),
        ("a.parquet.gz", b"", "unknown kind of file '.parquet.gz'"),
        (".jsonl", b"{}", "unknown kind of file"),
    ],
)
def test_useless_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^{tmp_path / name}: .*{says}"):
        load_records(str(tmp_path / name))


def test_empty_parquet_and_folder_without_data(tmp_path):
    written(tmp_path / "a.parquet", ROWS)
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: no rows"):
        load_records(str(tmp_path))
    (tmp_path / "a.parquet").rename(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"no data in this folder, it has: a.txt; expected .jsonl"):
        load_records(str(tmp_path))


def test_missing_paths_name_the_nearest_file(tmp_path):
    written(tmp_path / "preferences.jsonl", ROWS)
    with pytest.raises(
        DataError, match=r"preference.jsonl': no such file or folder \(did you mean 'preferences.jsonl'"
    ):
        load_records(str(tmp_path / "preference.jsonl"))
    for spec in ("", "nowhere.parquet", "./nowhere", "~/nowhere", "a/b/c"):
        with pytest.raises(DataError, match="no such file or folder"):
            load_records(spec)


def test_split_field_selects_rows_and_its_absence_is_told(tmp_path):
    splits = ["train", "test", "train", "test"]
    path = written(tmp_path / "a.jsonl", [row | {"split": x} for row, x in zip(ROWS, splits, strict=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prompts(str(path), "test") == ["p1", "p3"]
    with pytest.warns(DataWarning, match="all splits are used together \\('train', 'test'\\)"):
        assert len(prompts(str(path))) == 4
    with pytest.raises(DataError, match="no row of split 'dev'; the splits there are: 'train', 'test'"):
        load_records(str(path), "dev")
    with pytest.raises(DataError, match=r"no row of split 'train'; the splits there are: none"):
        load_records(str(written(tmp_path / "b.jsonl", ROWS)), "train")


def test_file_names_are_splits_where_rows_name_none(tmp_path):
    written(tmp_path / "train-00000-of-00001.parquet", ROWS[:3])
    written(tmp_path / "latest_test.jsonl", ROWS[3:])
    assert prompts(str(tmp_path), "train") == ["p0", "p1", "p2"]
    assert prompts(str(tmp_path), "test") == ["p3"]
    with pytest.warns(DataWarning, match="all splits"):
        assert len(prompts(str(tmp_path))) == 4


def test_json_with_one_object_a_line_is_read_as_such(tmp_path):
    """As SHP's files on the hub are."""
    path = tmp_path / "train.json"
    path.write_text("\n" + "\n".join(map(json.dumps, ROWS)))
    assert [x.origin.row for x in load_records(str(path)).records] == [2, 3, 4, 5]
    assert [row for _, row in read_rows(str(path), lazy=True)][1] == json.dumps(ROWS[1]).encode() + b"\n"
    path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS))
    with pytest.raises(DataError, match="not JSON: Extra data"):
        load_records(str(path))


def test_an_array_too_large_to_be_held_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("halos_pl.data.sources.formats.MAX_ARRAY", 2**20)
    path = tmp_path / "a.json"
    path.write_text("[" + " " * 2**20 + "]")
    with pytest.raises(DataError, match=r"a.json: an array of more than 1 MiB; expected one object a line"):
        load_records(str(path))


def test_the_first_row_says_whether_rows_have_a_split_field(tmp_path):
    """A file's name counts where they have none; the field counts where they have."""
    named = written(tmp_path / "test.jsonl", [ROWS[0] | {"split": "train"}, ROWS[1] | {"split": "test"}, ROWS[2]])
    assert prompts(str(named), "train") == ["p0"]
    assert prompts(str(named), "test") == ["p1", "p2"]  # the third has none: its file's name
    for lazy in (False, True):
        with pytest.warns(DataWarning, match="all splits are used together \\('test', 'train'\\)"):
            assert len(list(read_rows(str(named), lazy=lazy))) == 3
    plain = written(tmp_path / "train.jsonl", [ROWS[0], ROWS[1] | {"split": "test"}])
    assert prompts(str(plain), "train") == ["p0", "p1"]
    with pytest.raises(DataError, match="no row of split 'test'; the splits there are: 'train'"):
        load_records(str(plain), "test")


def test_an_unreadable_row_belongs_to_the_split_that_is_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" + json.dumps(ROWS[0] | {"split": "test"}) + "\n")
    assert len(list(read_rows(str(path), "test"))) == 2
    assert [type(row) for _, row in read_rows(str(path), "train")] == [DataError]


def test_split_names_of_several_words_are_found_in_file_names(tmp_path):
    written(tmp_path / "train_prefs-00000-of-00001.jsonl", ROWS[:1])
    written(tmp_path / "train_sft-00000-of-00001.jsonl", ROWS[1:2])
    written(tmp_path / "constraint.jsonl", ROWS[2:3])  # has "train" in it, but not as a word
    assert prompts(str(tmp_path), "train_prefs") == ["p0"]
    assert prompts(str(tmp_path), "train") == ["p0", "p1"]


def test_links_folders_and_pipes_named_like_data(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    written(data / "a.jsonl", ROWS)
    (data / "b.jsonl").symlink_to(data / "a.jsonl")
    assert len(prompts(str(data))) == 8
    (data / "b.jsonl").unlink()
    (data / "b.jsonl").symlink_to("b.jsonl")
    with pytest.raises(DataError, match=r"b.jsonl: a link to nothing; expected a file"):
        load_records(str(data))
    with pytest.raises(DataError, match="no such file or folder"):
        load_records(str(data / "b.jsonl"))
    (data / "b.jsonl").unlink()
    (data / "b.jsonl").mkdir()
    with pytest.raises(DataError, match=r"b.jsonl: a folder; expected a file, as its name has .jsonl"):
        load_records(str(data))
    (data / "b.jsonl").rmdir()
    os.mkfifo(data / "b.jsonl")
    with pytest.raises(DataError, match=r"b.jsonl: no regular file"):
        load_records(str(data))
    for name in (str(data / "b.jsonl"), "/dev/zero.jsonl"):
        with pytest.raises(DataError, match=r"not a regular file|no such file"):
            load_records(name)
    os.mkfifo(data / "c.parquet")
    with pytest.raises(DataError, match="not a regular file"):
        load_records(str(data / "c.parquet"))


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(type(tmp_path), "iterdir", Mock(side_effect=PermissionError("forbidden")))
    with pytest.raises(DataError, match=rf"^{tmp_path}: cannot be read: forbidden"):
        load_records(str(tmp_path))


def test_many_and_long_splits_are_not_all_listed(tmp_path):
    path = written(tmp_path / "a.jsonl", [ROWS[0] | {"split": f"{i}" * 99} for i in range(30)])
    with pytest.raises(DataError, match=r"the splits there are: '0{39}…, .* and 10 more$"):
        load_records(str(path), "dev")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_files_are_named(tmp_path):
    path = written(tmp_path / "a.jsonl", ROWS)
    path.chmod(0)
    with pytest.raises(DataError, match=r"a.jsonl: cannot be read: .*Permission denied"):
        load_records(str(path))


def test_names_that_no_file_can_have(tmp_path):
    for spec in ("x" * 5000 + ".jsonl", "a\0b.jsonl", str(tmp_path / ("y" * 300)), "~nobody-of-this-name/a.jsonl"):
        with pytest.raises(DataError):
            load_records(spec)


def test_sources_of_several_kinds_are_read_in_order(tmp_path):
    plain = written(tmp_path / "a.jsonl", ROWS[:1])
    renamed = written(tmp_path / "b.jsonl", [{"question": "q", "completion": "c", "label": 1}])
    source = Source(str(renamed), columns={"prompt": "question"})
    assert prompts([str(plain), source]) == ["p0", "q"]
    with pytest.raises(DataError, match="no row can be used; no source is given"):
        load_records([])


def test_rows_are_streamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{")
    rows = read_rows(str(path))
    assert next(rows)[1] == ROWS[0]
    assert isinstance(next(rows)[1], DataError)


@pytest.mark.parametrize(
    ("name", "split", "kind", "count"),
    [
        ("binary/blimp_acceptability.jsonl", "train", Unpaired, 1499),
        ("binary/chat_kto_en.jsonl", None, Unpaired, 229),
        ("paired/blimp_prefix.jsonl", "test", Paired, 1000),
        ("paired/chat_dpo_en.jsonl", None, Paired, 218),
        ("sft/gsm8k_train_2000.jsonl", None, Unpaired, 2000),
        ("sft/helpful_multi_turn.jsonl", None, Unpaired, 42),
        ("paired/hh_format_helpful.jsonl", None, Paired, 56),
    ],
)
def test_real_files_load_whole(shared_data, name, split, kind, count):
    records = load_records(str(shared_data / name), split).records
    assert len(records) == count
    assert {type(x) for x in records} == {kind}
