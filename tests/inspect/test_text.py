"""What the terminal shows: everything that was found, and nothing of the data that acts."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from halos_pl.inspect.text import show
from halos_pl.inspect.words import percent, span, visible


def test_it_names_rows_and_counts(inspected: Any, rows_file: Path) -> None:
    status, out = inspected(rows_file, "--data.max_length", "48", text=True)
    assert status == 1
    for told in (
        *("10 labelled completions", "6 desirable (60.0 %), 4 undesirable", "2 of 10 (20.0 %)"),
        *(f"{rows_file}:1 = {rows_file}:3", f"{rows_file}:4 and {rows_file}:2", f"{rows_file}:5", f"{rows_file}:9"),
        *(f"{rows_file}:11: label: missing", f"{rows_file}:12: completion: "),
        *("desirable_weight 0.667 to 0.888", "undesirable_weight 1.13 to 1.5", "1 : 1 gives 1.5: outside"),
    ):
        assert told in out, told
    assert out.index("! ") < out.index("\nrows\n")  # warnings come first
    assert re.search(r"whole +10 +10 +21 +67 +67 +67", out)
    assert "What is 2 + 2?" in out
    assert "prompt (24 tokens read, 14 more cut off)\n    ✂  story about the old sea" in out


def test_control_characters_are_pictures(inspected: Any, rows_file: Path) -> None:
    _, out = inspected(rows_file, "--data.max_length", "48", text=True)
    assert "\x1b" not in out
    assert "␛[31m" in out
    assert visible("a\x07\r\x9b1m\u202eb\x7f\n\t") == "a␇␍\\x9b1m\\u202eb␡\n\t".replace("\\x9b", "\\u009b")


def test_on_a_terminal_lines_are_broken_between_words(inspected: Any, rows_file: Path) -> None:
    _, facts = inspected(rows_file)
    console = Console(file=(out := io.StringIO()), force_terminal=True, width=70, color_system=None)
    show(facts, console)
    paths = [line for line in out.getvalue().splitlines() if len(line) > 70]
    assert all(str(rows_file.parent.parent) in line for line in paths), paths


def test_a_scored_token_does_not_look_like_a_read_one(inspected: Any, rows_file: Path) -> None:
    _, facts = inspected(rows_file)
    console = Console(file=(out := io.StringIO()), force_terminal=True, width=200)
    show(facts, console)
    assert "\x1b[2mW\x1b[0m" in out.getvalue() or re.search(r"\x1b\[2mWhat is", out.getvalue())
    assert re.search(r"    Four\.|     Four\.", re.sub(r"\x1b\[0m", "", out.getvalue()))
    assert re.search(r"\x1b\[1;30;43m</s>", out.getvalue())


def test_newlines_are_seen(inspected: Any, write: Any) -> None:
    _, out = inspected(write({"prompt": "p", "completion": "a\n\nb", "label": True}), text=True)
    assert "    a⏎\n    ⏎\n    b</s>" in out


def test_shares_that_are_not_quite_nothing() -> None:
    assert [percent(x) for x in (0, 0.0004, 0.0316, 0.9999, 1)] == ["0.0 %", "< 0.1 %", "3.2 %", "> 99.9 %", "100.0 %"]


def test_a_range_never_grows() -> None:
    assert span([2 / 3, 8 / 9]) == "0.667 to 0.888"
    assert span([1.0, 4 / 3]) == "1 to 1.33"
    assert span([1000.5, 1334.0]) == "1010 to 1330"
