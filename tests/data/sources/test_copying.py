"""Rows copied out as they stand."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halos_pl.data.records import DataError
from halos_pl.data.sources import Source, copy_rows, count_rows, read_rows

ROWS = [{"prompt": f"p{i}é", "completion": f"c{i}"} for i in range(4)]


def copied(source, *rows):
    source = source if isinstance(source, Source) else Source(str(source))
    out = io.BytesIO()
    found = copy_rows(source, set(rows), out)
    assert found <= set(rows)
    return len(found), out.getvalue()


def test_lines_are_copied_bit_for_bit(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'\xef\xbb\xbf{"a":1}\r\n', b"\n", b'{"b" :  "\xff"}\n', b"{broken\r\n", b'{"c": 1}']
    path.write_bytes(b"".join(lines))
    name = str(path)
    assert copied(path, (name, 1), (name, 3), (name, 4)) == (3, lines[0] + lines[2] + lines[3])
    assert copied(path, (name, 5)) == (1, lines[4] + b"\n")
    assert copied(path, (name, 9), ("other", 1)) == (0, b"")
    assert copy_rows(Source(name), [(name, 3), (name, 9)], io.BytesIO()) == {(name, 3)}


def test_lines_without_ending_do_not_run_together(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(f'{{"{name}": 1}}'.encode())
    wanted = [(str(tmp_path / name), 1) for name in ("a.jsonl", "b.jsonl")]
    assert copied(tmp_path, *wanted) == (2, b'{"a.jsonl": 1}\n{"b.jsonl": 1}\n')


def test_records_of_tables_are_copied_bit_for_bit(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\r\n"a\nb", c\r\n\r\nd,e\xff\nf,"g\r\n')
    name = str(path)
    assert copied(path, (name, 2), (name, 5)) == (2, b'"a\nb", c\r\nd,e\xff\n')
    assert copied(path, (name, 6)) == (1, b'f,"g\r\n')
    tabs = path.rename(tmp_path / "a.tsv")
    tabs.write_bytes(b'prompt\tcompletion\na,"b\tc"d\n')
    assert copied(tabs, (str(tabs), 2)) == (1, b'a,"b\tc"d\n')


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_other_rows_become_lines_of_json(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    count, content = copied(path, (str(path), 2), (str(path), 4))
    assert count == 2
    assert [json.loads(x) for x in content.splitlines()] == [ROWS[1], ROWS[3]]
    assert count_rows(Source(str(path))) == (4 if kind == "parquet" else None)


def test_of_a_reader_the_rows_of_the_source_are_copied(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"question": "q", "answer": f"#### {i}"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(str(path), reader="gsm8k")
    (origin, _) = list(read_rows(source))[1]
    assert copied(source, (origin.file, origin.row)) == (1, json.dumps(rows[1]).encode() + b"\n")


def test_generated_rows_are_copied():
    rows = read_rows("nano:stories")
    (first, row), _ = next(rows), rows.close()
    count, content = copied(Source("nano:stories"), (first.file, first.row))
    assert (count, json.loads(content)) == (1, row)
    assert count_rows(Source("nano:stories")) is None


def test_lines_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"1\n2\n3")
    (tmp_path / "b.jsonl").write_bytes(b"1\n")
    assert count_rows(Source(str(tmp_path / "a.jsonl"))) == 3
    assert count_rows(Source(str(tmp_path))) == 4
    (tmp_path / "c.jsonl.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"c.jsonl.gz: cannot be read"):
        count_rows(Source(str(tmp_path)))
