"""`python -m halos_pl objectives`: every loss that ships, what it needs and what it costs."""

from __future__ import annotations

import argparse
import os
import sys

from halos_pl import halo
from halos_pl.losses import OBJECTIVES, Objective

HEADER = ("objective", "feedback", "reference", "forward passes a step", "loss of an example", "source")
FEEDBACK = {"unpaired": "thumbs", "paired": "pairs", "sft": "demonstrations"}


def cells(objective: Objective) -> tuple[str, ...]:
    """A line of the table: what the objective declares, in words."""
    feedback = FEEDBACK[objective.view] + (", equal halves" if objective.equal_halves else "")
    reference, passes, models = "–", 1, "π"
    if objective.needs_reference:
        reference = "yes" if objective.reference_free == "refused" else "yes, or none"
        passes, models = 2, "π, π_ref"
    if objective.reference_point_from == "mismatched":
        passes, models = 2 * passes, f"{models}, on y and y′"
    return type(objective).__name__, feedback, reference, f"{passes}: {models}", objective.formula, objective.source


def markdown() -> str:
    """The table as it stands in the README."""
    lines = [HEADER, tuple("---" for _ in HEADER), *(cells(objective()) for objective in OBJECTIVES)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str]) -> int:
    """Print what there is; returns 0, also where whoever reads it leaves early."""
    try:
        _print(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _print(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m halos_pl objectives", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="a table in Markdown")
    parser.add_argument("--halo", action="store_true", help="which are human-aware losses, in Markdown")
    options = parser.parse_args(argv)
    if options.markdown or options.halo:
        print(halo.table() if options.halo else markdown())
        return
    for objective in OBJECTIVES:
        name, feedback, reference, passes, formula, source = cells(objective())
        print(f"{name:<11} {formula}    ({source})\n{'':<11} {feedback}; reference: {reference}; passes {passes}\n")
    print(
        "r: log-ratio to the reference; ℓ: log-probability; bars: means over tokens; w, l: chosen and rejected.\n"
        "Choose one with --model.objective NAME; its options: python -m halos_pl fit --model.objective.help NAME"
    )
