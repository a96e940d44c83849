"""The page: well-formed, in one piece, and deaf to what the data say."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from halos_pl.inspect.charts import histogram

VOID = {"meta", "link", "br", "img"}


class Reader(HTMLParser):
    """Checks that tags close in order, and collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def page(inspected: Any, rows_file: Path, tmp_path: Path) -> str:
    path = tmp_path / "page.html"
    inspected(rows_file, "--data.max_length", "48", "--examples", "10", "--html", str(path))
    return path.read_text(encoding="utf-8")


def test_one_file_without_script_or_network(page: str) -> None:
    tags = read(page).tags
    names = {name for name, _ in tags}
    assert names.isdisjoint({"script", "link", "iframe", "img", "object", "form"})
    assert not [
        name for _, attributes in tags for name in attributes if name.startswith("on") or name in ("src", "href")
    ]
    assert not re.search(r"https?:|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page
    assert page.startswith("<!doctype html>")


def test_it_holds_what_the_text_holds(page: str, inspected: Any, rows_file: Path) -> None:
    text = "".join(read(page).text)
    _, facts = inspected(rows_file, "--data.max_length", "48", "--examples", "10")
    for x in facts["warnings"]:
        assert x["text"] in text
        assert x["remedy"] in text
    for told in (f"{rows_file}:11: label: missing", f"{rows_file}:1 = {rows_file}:3", "6 desirable (60.0 %)"):
        assert told in text
    for name, x in facts["lengths"].items():
        assert f"{name}" + "".join(str(n) for n in x.values()) in text


def test_an_evil_row_is_text(page: str) -> None:
    reader = read(page)
    assert "<script>alert(1)</script>␛[31m" in "".join(reader.text)
    assert "<script" not in page
    assert "\x1b" not in page


def test_an_evil_name_is_text(inspected: Any, tmp_path: Path) -> None:
    path = tmp_path / "<b onclick=x>&.jsonl"
    path.write_text('{"prompt": "p", "completion": "c\\u202ed", "label": true}\n', encoding="utf-8")
    where = tmp_path / "page.html"
    inspected(path, "--html", str(where))
    reader = read(where.read_text(encoding="utf-8"))
    assert "b" not in {name for name, _ in reader.tags}
    assert "<b onclick=x>&.jsonl" in "".join(reader.text)
    assert "\u202e" not in "".join(reader.text)


def test_tokens_are_told_apart(page: str) -> None:
    """A character is a token here: shades alternate, EOS has its own."""
    assert '<span class="t text"> </span><span class="t odd text">F</span><span class="t text">o</span>' in page
    assert '<span class="t eos">&lt;/s&gt;</span>' in page
    assert (
        '<span class="t special">&lt;/s&gt;</span>' in page or '<span class="t odd special">&lt;/s&gt;</span>' in page
    )


def test_histograms() -> None:
    one = {"begin": 0, "width": 10, "counts": [1, 3], "more": False}
    other = {"begin": 0, "width": 10, "counts": [8, 0], "more": False}
    alone = histogram({"prompt": one}, limit=5)
    heights = [float(x) for x in re.findall(r'class="bar[^>]* height="([\d.]+)"', alone)]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.2)
    assert 'class="limit" x1="80.0"' in alone  # a quarter of the way to 20
    assert 'class="limit"' not in histogram({"prompt": one}, limit=20)
    both = [float(x) for x in re.findall(r'class="bar[^>]* height="([\d.]+)"', histogram({"a": one, "b": other}))]
    assert both[2] == pytest.approx(4 * both[0], abs=0.2)  # shares of a class, not counts
    assert "prompt: 10 to 19 tokens: 3 of 4" not in alone
    assert "prompt: 10 tokens: 3 of 4" in alone
    read(f"<div>{alone}</div>")
