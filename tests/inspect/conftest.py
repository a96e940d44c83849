"""Twelve rows whose every count is known by hand; a character is a token of the tokenizer, EOS comes on top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halos_pl.__main__ import main

SUM = "What is 2 + 2?"  # 14 tokens
ROWS: list[dict[str, Any]] = [
    {"prompt": SUM, "completion": " Four.", "label": True},  # 14 + 7 tokens
    {"prompt": SUM, "completion": " Five.", "label": False},
    {"prompt": SUM, "completion": " Four.", "label": True},  # says again what row 1 says
    {"prompt": SUM, "completion": " Five.", "label": True},  # contradicts row 2
    {"prompt": "Say yes.", "completion": "y", "label": True},  # 8 + 2: one token and EOS
    {"prompt": "Tell me a long story about the old sea", "completion": " Once there was a ship.", "label": True},
    {"prompt": "Go on:", "completion": "a" * 60, "label": False},  # 6 + 61, the row above has 38 + 24
    {"prompt": "user: hi</s>", "completion": " hello", "label": True},  # 9 + 7, one of them special
    {"prompt": "Repeat after me", "completion": "Repeat after me, now", "label": False},  # 15 + 21
    {"prompt": "Evil", "completion": "<script>alert(1)</script>\x1b[31m", "label": False},  # 4 + 31
    {"prompt": "x", "completion": "y", "lable": True},
    {"prompt": "x", "completion": "", "label": True},
]


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspected") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def inspected(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> Any:
    """Runs the command on a file: status, and the parsed report (with `text=True`, the text)."""

    def run(path: Path | str, *options: str, text: bool = False) -> tuple[int, Any]:
        where = [] if any(x.startswith("--data.tokenizer") for x in options) else ["--data.tokenizer", str(tiny_model)]
        kind = [] if text else ["--json"]
        status = main(["data", "inspect", "--data.train", str(path), *where, *kind, *options])
        out = capsys.readouterr().out
        return status, out if text else json.loads(out)

    return run


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes rows to a file of their own."""

    def rows(*given: dict[str, Any]) -> Path:
        path = tmp_path / "own.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
        return path

    return rows
