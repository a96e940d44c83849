"""CSV and TSV, as spreadsheets and pandas write them."""

import json

import pytest

from halos_pl.data.records import DataError, Paired
from halos_pl.data.sources import Source, load_records, read_rows

MESSAGES = [{"role": "user", "content": 'a,\n"b"'}]


def rows(path, content, **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(origin.row, row) for origin, row in read_rows(Source(str(path), **options))]


def test_cells_are_texts_and_scores_numbers(tmp_path):
    content = 'prompt,completion,label,score\nq,"a, ""b""",true,0.5\n1,2,False,-3\n'
    assert rows(tmp_path / "a.csv", content) == [
        (2, {"prompt": "q", "completion": 'a, "b"', "label": "true", "score": 0.5}),
        (3, {"prompt": "1", "completion": "2", "label": "False", "score": -3.0}),
    ]
    first, second = load_records(str(tmp_path / "a.csv")).records
    assert (first.desirable, second.desirable, second.score) == (True, False, -3.0)


def test_empty_cells_are_absent_but_completions(tmp_path):
    got = rows(tmp_path / "a.csv", "prompt,completion,label,score\nq,,,\n,c,1,\n")
    assert got == [(2, {"prompt": "q", "completion": ""}), (3, {"completion": "c", "label": "1"})]
    with pytest.raises(DataError, match=r"a.csv:2: completion: an empty completion"):
        load_records(str(tmp_path / "a.csv"))


def test_a_bad_score_is_left_to_be_refused(tmp_path):
    assert rows(tmp_path / "a.csv", "prompt,completion,score\np,c,much\n")[0][1]["score"] == "much"
    with pytest.raises(DataError, match=r"a.csv:2: score: got 'much'"):
        load_records(str(tmp_path / "a.csv"))


def test_records_over_several_lines_have_the_line_where_they_start(tmp_path):
    content = b'\xef\xbb\xbfprompt,completion\r\n"a\r\nb","c\rd\n"\r\n\r\n \r\ne,f'
    assert rows(tmp_path / "a.csv", content) == [
        (2, {"prompt": "a\r\nb", "completion": "c\rd\n"}),
        (7, {"prompt": "e", "completion": "f"}),
    ]


def test_tabs_separate_in_tsv(tmp_path):
    assert rows(tmp_path / "a.tsv", 'prompt\tcompletion\na,b\t"c\td"\n') == [
        (2, {"prompt": "a,b", "completion": "c\td"})
    ]


def test_a_column_of_messages_is_parsed(tmp_path):
    chat = json.dumps(MESSAGES).replace('"', '""')
    reply = json.dumps([{"role": "assistant", "content": "x"}]).replace('"', '""')
    path = tmp_path / "a.csv"
    path.write_text(f'prompt,chosen,rejected\n"{chat}","{reply}","{reply.replace("x", "y")}"\n')
    (record,) = load_records(str(path)).records
    assert isinstance(record, Paired)
    assert record.prompt == MESSAGES
    assert record.rejected == [{"role": "assistant", "content": "y"}]
    path.write_text(path.read_text() + f'"{chat}",[oh,"{reply}"\n')
    (_, good), (_, error) = read_rows(str(path))
    assert good["prompt"] == MESSAGES
    assert str(error).startswith(f"{path}:3: chosen: not JSON: Expecting value")


def test_a_first_cell_that_is_text_keeps_its_column_text(tmp_path):
    chat = json.dumps(MESSAGES).replace('"', '""')
    got = rows(tmp_path / "a.csv", f'prompt,completion\n[1] see below,c\n"{chat}",[]\n"[1, 2]",d\n')
    assert [row["prompt"] for _, row in got] == ["[1] see below", json.dumps(MESSAGES), "[1, 2]"]
    assert got[1][1]["completion"] == "[]"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a,b,c", "2: 3 fields; expected 2: prompt, completion"),
        ("a", "2: 1 fields; expected 2: prompt, completion"),
        ('a"b",c"', None),  # quotes within an unquoted cell are themselves
        ('"a"b,c', "2: ',' expected after '\"'; expected a record of fields in CSV's quoting"),
        ("a\rb,c", "2: a carriage return outside of quotes"),
        (b"a,\xff", "2: byte 3: not UTF-8 (invalid start byte); expected a record of fields"),
        (b'"a\nb","\xff"', "2: byte 8: not UTF-8 (invalid start byte); expected a record of fields"),
    ],
)
def test_bad_records_are_named_and_the_next_ones_read(tmp_path, line, says):
    line = line if isinstance(line, bytes) else line.encode()
    got = rows(tmp_path / "a.csv", b"prompt,completion\n" + line + b"\nx,y\n")
    assert got[-1][1] == {"prompt": "x", "completion": "y"}
    if says is None:
        assert got[0] == (2, {"prompt": 'a"b"', "completion": 'c"'})
    else:
        assert got[0][0] == 2
        assert str(got[0][1]).startswith(f"{tmp_path / 'a.csv'}:{says}")


def test_a_tab_is_escaped_in_what_is_said_of_a_record(tmp_path):
    ((_, error),) = rows(tmp_path / "a.tsv", 'prompt\tcompletion\n"a"b\tc\n')
    assert "a.tsv:2: '\\t' expected after" in str(error)


def test_a_quote_that_is_never_closed(tmp_path):
    ((line, error),) = rows(tmp_path / "a.csv", 'prompt,completion\n"a,b\nc,d\n')
    assert line == 2
    assert "a.csv:2: a quote that is never closed; expected" in str(error)


def test_large_cells_up_to_the_limit(tmp_path, monkeypatch):
    big = "x" * 300_000  # the csv module's own limit is 131,072
    assert rows(tmp_path / "a.csv", f"prompt,completion\np,{big}\n")[0][1]["completion"] == big
    monkeypatch.setattr("halos_pl.data.sources.formats.MAX_LINE", 2**20)
    got = rows(tmp_path / "b.csv", f"prompt,completion\np,{big * 4}\nq,r\n")
    assert "b.csv:2: a line of more than 1 MiB" in str(got[0][1])
    assert got[1] == (3, {"prompt": "q", "completion": "r"})
    got = rows(tmp_path / "c.csv", f'prompt,completion\n"p\n{big * 4}",c\nq,r\n')
    assert "c.csv:2: a line of more than 1 MiB" in str(got[0][1])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no rows in this file"),
        ("\n\n", "no rows in this file"),
        ("prompt,completion\n", "no rows in this file"),
        ("prompt,,completion\na,b,c\n", "1: no header"),
        ("prompt,a\tb\x1b," + "c," * 99, r"1: no header: prompt, 'a\\tb\\x1b', (c, ){17}c and 82 more; expected"),
        ("prompt,prompt\na,b\n", "1: two columns are named 'prompt'"),
        ("prompt, prompt\na,b\n", "1: two columns are named 'prompt'"),
        (f"{'word ' * 20},yes\na,b\n", "1: no header"),
        ("prompt;completion;label\na;b;1\n", "1: one column, 'prompt;completion;label', separated by ';'"),
        ("prompt\tcompletion\na\tb\n", "1: one column, .*, separated by '.t'. expected ','"),
    ],
)
def test_headers_that_are_none(tmp_path, content, says):
    with pytest.raises(DataError, match=rf"^{tmp_path / 'a.csv'}:? ?{says}"):
        rows(tmp_path / "a.csv", content)


def test_header_names_lose_their_spaces_and_a_file_without_a_known_name_lists_them(tmp_path):
    assert rows(tmp_path / "a.csv", "prompt, completion\na,b\n") == [(2, {"prompt": "a", "completion": "b"})]
    (tmp_path / "b.csv").write_text("hello,world\nhow,are you\n")
    with pytest.raises(DataError, match="missing, the row's keys are: hello, world"):
        load_records(str(tmp_path / "b.csv"))


def test_columns_may_be_empty_but_must_be_there(tmp_path):
    content = "question,answer,thumbs,points\nq,a,up,\nr,,,2\n"
    columns = {"prompt": "question", "completion": "answer", "label": "thumbs", "score": "points"}
    assert rows(tmp_path / "a.csv", content, columns=columns) == [
        (2, {"prompt": "q", "completion": "a", "label": "up"}),
        (3, {"prompt": "r", "completion": "", "score": 2.0}),
    ]
    ((_, error), _) = rows(tmp_path / "a.csv", content, columns={"prompt": "question", "label": "thumb"})
    assert "a.csv:2: thumb: no such column, the row's keys are: question, answer, thumbs, points" in str(error)
