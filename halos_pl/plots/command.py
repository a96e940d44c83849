"""`python -m halos_pl plot PICTURE`: draw a figure of the KTO report into a file.

A further picture is a branch of `parser` and a function from its options to a figure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import matplotlib
from matplotlib.figure import Figure

from halos_pl.plots.value_functions import draw_value_functions
from halos_pl.value import VALUE_FUNCTIONS

# No date and no random names: the same picture is the same file.
FORMATS: dict[str, dict[str, str | None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""What `--out` may end in, and the metadata that is left out of such a file."""


class PlotError(ValueError):
    """A picture cannot be drawn; the message says why."""


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0; 2 for a mistake of the user's, told on stderr in one line.
    """
    try:
        options = parser().parse_args(argv)
        draw(options)
    except (ValueError, OSError) as error:
        print(f"halos_pl: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


def draw(options: argparse.Namespace) -> None:
    """Draw the picture of the options into their file, whatever the machine's own matplotlib settings are.

    Raises:
        ValueError: a number out of range.
        OSError: the file cannot be written.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("font", size=9.5)
        matplotlib.rc("pdf", fonttype=42)  # conferences refuse the other kind
        matplotlib.rc("svg", hashsalt="halos-pl")
        figure: Figure = options.draw(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        suffix = options.out.suffix.lower()
        figure.savefig(options.out, format=suffix[1:], dpi=200, metadata=FORMATS[suffix])


def _value_functions(options: argparse.Namespace) -> Figure:
    low, high = options.range
    return draw_value_functions(options.only, betas=options.beta, low=low, high=high)


def _picture(name: str) -> Path:
    path = Path(name)
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"expected a file name that ends in {', '.join(FORMATS)}, got {name!r}")
    return path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PlotError(message)


def parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m halos_pl plot",
        description="Draw a figure of the KTO report into a .png, .svg or .pdf file.",
        epilog="`python -m halos_pl plot PICTURE --help` lists the options of a picture.",
        allow_abbrev=False,
    )
    pictures = parser.add_subparsers(title="pictures", metavar="PICTURE", required=True)
    picture = pictures.add_parser(
        "value-functions",
        help="the human value that each loss implies (figure 4)",
        description="The human value of an outcome that each loss implies, over reward − reference point (figure 4). "
        "The curves are shifted so that the reference point is worth 0.",
        epilog="Of RLHF, DPO, KTO and Kahneman–Tversky another beta only stretches the horizontal axis. "
        "For SLiC beta is the margin. PPO-Clip has none.",
        allow_abbrev=False,
    )
    picture.set_defaults(draw=_value_functions)
    add = picture.add_argument
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=VALUE_FUNCTIONS,
        default=VALUE_FUNCTIONS,
        help=f"draw these of {', '.join(VALUE_FUNCTIONS)} (default: all)",
    )
    add(
        "--beta",
        nargs="+",
        type=float,
        metavar="B",
        default=[1.0],
        help="one panel with its own axes for each, at most 12 (default: 1)",
    )
    add(
        "--range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        default=(-4.0, 4.0),
        help="of reward − reference point in nats, LOW < 0 < HIGH (default: -4 4)",
    )
    add(
        "--out",
        type=_picture,
        metavar="FILE",
        default=Path("value-functions.png"),
        help="written anew; ends in .png, .svg or .pdf (default: value-functions.png)",
    )
    return parser
