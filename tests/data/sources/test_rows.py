"""JSON lines, whole and unparsed."""

import json

import pytest

from halos_pl.data.records import DataError, Origin
from halos_pl.data.sources import Source, parsed, read_rows
from halos_pl.data.sources import rows as rows_module

ORIGIN = Origin("a.jsonl", 7)
ROWS = [{"prompt": f"p{i}", "completion": f"c{i}", "label": i % 2 == 0} for i in range(4)]


def lines(path, rows, end=b"\n"):
    path.write_bytes(b"".join(json.dumps(row).encode() + end for row in rows))
    return str(path)


def test_parsed_gives_objects_and_leaves_everything_else():
    assert parsed(b' {"prompt": "\xc3\xa9"}\r\n', ORIGIN) == {"prompt": "é"}
    row = {"prompt": "x"}
    assert parsed(row, ORIGIN) is row
    error = DataError("x")
    assert parsed(error, ORIGIN) is error
    assert parsed("{}", ORIGIN) == "{}"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "a.jsonl:7: column 2: Expecting property name"),
        (b'{"a": 1, "b": {"c": [{"d": 1, "e": 2, "d": 1}]}}', "the key 'd' stands twice in one object"),
        (b'{"%s": 1, "%s": 2}' % (b"k" * 999, b"k" * 999), "the key 'kkkkkkkkkkkk...kkkkkkkkkkkkk' stands twice"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": [Infinity]}', "Infinity is no JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl:7: Exceeds the limit"),
        (b"[" * 200_000, "a.jsonl:7: "),
        (b'{"a": "\xe9"}', "byte 8: not UTF-8"),
        (b'{"a": "x\ry"}', "Invalid control character"),
        (b'\xff\xfe{\x00"\x00', "byte 1: not UTF-8"),
        (b'{"a": 1} {"a": 2}', "column 10: Extra data"),
        (b'{"a": 1\r\n', "column 8: Expecting ',' delimiter"),
    ],
)
def test_parsed_says_why_a_line_is_no_row(line, says):
    error = parsed(line, ORIGIN)
    assert isinstance(error, DataError)
    assert says in str(error)
    assert str(error).endswith("; expected one JSON object a line")
    assert error.origin == ORIGIN


def test_lazy_rows_are_the_lines_and_parse_to_the_same(tmp_path):
    path = tmp_path / "a.jsonl"
    content = [json.dumps(row).encode() for row in ROWS]
    path.write_bytes(b"\xef\xbb\xbf" + content[0] + b"\r\n \t\n" + content[1] + b"\n{\n" + content[2])
    lazy = list(read_rows(str(path), lazy=True))
    assert [row for _, row in lazy] == [content[0] + b"\r\n", content[1] + b"\n", b"{\n", content[2]]
    eager = list(read_rows(str(path)))
    assert [(o, str(parsed(row, o))) for o, row in lazy] == [(o, str(row)) for o, row in eager]
    assert [o.row for o, _ in lazy] == [1, 3, 4, 5]


def test_what_must_be_looked_into_is_not_lazy(tmp_path):
    path = lines(tmp_path / "a.jsonl", [row | {"score": 1, "split": "train"} for row in ROWS])
    for source in (
        Source(path, split="train"),
        Source(path, threshold=0.5),
        Source(path, columns={"prompt": "completion"}),
    ):
        assert not any(isinstance(row, bytes) for _, row in read_rows(source, lazy=True))
    named = lines(tmp_path / "train.jsonl", ROWS)
    assert all(isinstance(row, bytes) for _, row in read_rows(Source(named, split="train"), lazy=True))


def test_a_line_that_is_too_long_is_refused_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr("halos_pl.data.sources.formats.MAX_LINE", 2**20)
    path = tmp_path / "a.jsonl"
    whole = json.dumps(ROWS[0]).encode()
    exact = whole[:-1] + b" " * (2**20 - len(whole) - 1) + b"}\n"
    assert len(exact) == 2**20
    path.write_bytes(exact + b'{"prompt": "' + b"x" * (3 * 2**20) + b'"}\n' + whole + b"\n")
    (_, first), (origin, error), (last_origin, last) = read_rows(str(path))
    assert first == last == ROWS[0]
    assert str(error) == f"{path}:2: a line of more than 1 MiB; expected one row"
    assert (origin.row, last_origin.row) == (2, 3)


def test_the_first_row_is_looked_for_in_a_bounded_head(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    hh = json.dumps({key: "\n\nHuman: q\n\nAssistant: a" + key for key in ("chosen", "rejected")})
    path.write_text("{\n" * 99 + hh + "\n")
    assert list(read_rows(str(path)))[-1][1]["prompt"] == [{"role": "user", "content": "q"}]
    path.write_text("{\n" * 100 + hh + "\n")
    assert "prompt" not in list(read_rows(str(path)))[-1][1]
    monkeypatch.setattr(rows_module, "HEAD_BYTES", 10)
    path.write_text("{\n" * 6 + hh + "\n")
    assert "prompt" not in list(read_rows(str(path)))[-1][1]
