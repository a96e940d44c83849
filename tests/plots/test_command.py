"""`plot`: the files it writes, that they are the same each time, and what a mistake is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.figure
import pytest

from halos_pl.__main__ import main
from halos_pl.plots.command import FORMATS

MAGIC = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}
Told = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plot(*argv: object) -> int:
    return main(["plot", "value-functions", *map(str, argv)])


def refused(capsys: Told) -> str:
    """The one line of the refusal; nothing was printed, and nothing written."""
    told = capsys.readouterr()
    assert not told.out
    assert told.err.startswith("halos_pl: error: ")
    assert told.err.count("\n") == 1
    assert not any(path.is_file() for path in Path().rglob("*"))
    return told.err


def test_the_default_file(capsys: Told) -> None:
    assert plot() == 0
    assert capsys.readouterr() == ("value-functions.png\n", "")
    assert Path("value-functions.png").read_bytes().startswith(MAGIC[".png"])


@pytest.mark.parametrize("suffix", [*FORMATS, ".PDF"])
def test_each_format_in_a_new_folder_is_the_same_file_each_time(suffix: str, capsys: Told) -> None:
    path = Path("new", "folder", f"picture{suffix}")
    contents = []
    for _ in range(2):
        assert plot("--only", "kto", "--out", path) == 0
        assert capsys.readouterr().out == f"{path}\n"
        contents.append(path.read_bytes())
    assert contents[0].startswith(MAGIC[suffix.lower()])
    assert contents[0] == contents[1]


def test_the_options_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    assert plot("--only", "dpo", "kto", "--beta", 0.1, 2, "--range", -2, 3.5) == 0
    (figure,) = figures
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["β = 0.1", "β = 2"]
    for axes in figure.axes:
        assert axes.get_xlim() == (-2, 3.5)
        assert {"DPO", "KTO"} == {x.get_label() for x in axes.get_lines() if not x.get_label().startswith("_")}


def test_settings_of_matplotlib_neither_matter_nor_change() -> None:
    assert plot("--out", "plain.svg") == 0
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert plot("--out", "styled.svg") == 0
        assert dict(matplotlib.rcParams) == before
    assert Path("plain.svg").read_bytes() == Path("styled.svg").read_bytes()


def test_pyplot_is_not_loaded() -> None:
    code = (
        "import sys; from halos_pl.__main__ import main; "
        "assert main(['plot', 'value-functions']) == 0; assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "picture.jpg"], "expected a file name that ends in .png, .svg, .pdf, got 'picture.jpg'"),
        (["--out", "picture"], "got 'picture'"),
        (["--only", "ipo"], "--only: invalid choice: 'ipo'"),
        (["--only"], "--only: expected at least one argument"),
        (["--beta", "big"], "--beta: invalid float value: 'big'"),
        (["--range", "1"], "--range: expected 2 arguments"),
        (["--bta", "1"], "unrecognized arguments: --bta 1"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(argv: list[str], message: str, capsys: Told) -> None:
    assert plot(*argv) == 2
    assert message in refused(capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--beta", "1", "-1"], "beta must be a finite number > 0, got -1.0"),
        (["--beta", "nan"], "beta must be a finite number > 0, got nan"),
        (["--range", "1", "4"], "low < 0 < high, got 1.0 and 4.0"),
        (["--beta", *map(str, range(1, 601))], "at most 12 betas"),
    ],
)
def test_numbers_out_of_range(argv: list[str], message: str, capsys: Told) -> None:
    assert plot("--out", "new/picture.png", *argv) == 2
    assert message in refused(capsys)


def test_a_place_that_cannot_be_written(capsys: Told) -> None:
    Path("folder.png").mkdir()
    assert plot("--out", "folder.png") == 2
    assert "folder.png" in refused(capsys)


@pytest.mark.parametrize(("argv", "message"), [([], "required: PICTURE"), (["cats"], "invalid choice: 'cats'")])
def test_which_picture(argv: list[str], message: str, capsys: Told) -> None:
    assert main(["plot", *argv]) == 2
    assert message in refused(capsys)


@pytest.mark.parametrize(("argv", "message"), [([], "value-functions"), (["value-functions"], "--range LOW HIGH")])
def test_help(argv: list[str], message: str, capsys: Told) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plot", *argv, "--help"])
    assert stop.value.code == 0
    assert message in capsys.readouterr().out
