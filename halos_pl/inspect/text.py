"""The report on a terminal."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

from halos_pl.inspect.words import HEADINGS, Facts, counted, number, sections, title, visible

STYLES = {"text": "", "special": "cyan", "eos": "bold black on yellow"}
LABEL = 17  # columns


def show(facts: Facts, console: Console) -> None:
    """Print the report; texts of the data can do nothing to the terminal."""
    _print(console, title(facts), style="bold")
    console.print()
    for x in facts["warnings"]:
        mark, style = ("!", "yellow") if x["level"] == "warning" else ("·", "cyan")
        _print(console, f"{x['text']} → {x['remedy']}", label=Text(f"{mark} ", style=style))
    if not any(x["level"] == "warning" for x in facts["warnings"]):
        _print(console, "nothing to warn of", label=Text("✓ ", style="green"))
    for section in sections(facts):
        console.print()
        _print(console, section.title, style="bold")
        for label, text in section.lines:
            _line(console, label, text)
        if section.title == "length":
            console.print(_table(facts))
    for number_, example in enumerate(facts["examples"], 1):
        console.print()
        _print(console, f"example {number_}: {example['place']}, {example['why']}", style="bold")
        for part in example["parts"]:
            _part(console, part)


def _line(console: Console, label: str, text: str) -> None:
    _print(console, text, label=Text(f"  {label:{LABEL}}", style="dim"))


def _print(console: Console, text: str, *, label: Text | None = None, style: str = "") -> None:
    """A line, on a terminal broken between words, with what follows below its beginning; paths stay whole."""
    label = label or Text()
    width = max(console.width, 40) - len(label)
    lines = [" ".join(visible(text).split())]
    if console.is_terminal:
        lines = textwrap.wrap(lines[0], width, break_long_words=False, break_on_hyphens=False) or [""]
    for i, line in enumerate(lines):
        console.print((label if not i else Text(" " * min(len(label), LABEL + 2))) + Text(line, style), soft_wrap=True)


def _table(facts: Facts) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("  tokens", style="dim", no_wrap=True)
    for heading in HEADINGS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, values in facts["lengths"].items():
        table.add_row(f"  {name}", *(number(values[key]) for key in HEADINGS))
    return table


def _part(console: Console, part: Facts) -> None:
    """Prompt tokens are dim, scored ones are not; every newline is seen."""
    read_only = part["name"] == "prompt"
    cut = f", {number(part['cut'])} more cut off" if part["cut"] else ""
    told = "read" if read_only else "scored"
    console.print(
        Text(f"  {part['name']} ({counted(part['tokens'], 'token')} {told}{cut})", "dim" if read_only else "green")
    )
    text = Text()
    if part["cut"] and read_only:
        text.append("✂ ", "red")
    for piece in part["pieces"]:
        if "left_out" in piece:
            text.append(f" … {number(piece['left_out'])} tokens … ", "italic magenta")
            continue
        style = STYLES[piece["kind"]] + (" dim" if read_only else "")
        text.append(visible(piece["text"]).replace("\r", "␍").replace("\n", "⏎\n"), style)
    if part["cut"] and not read_only:
        text.append(" ✂", "red")
    text.rstrip()
    for line in text.split("\n", allow_blank=True):
        console.print(Text("    ") + line, soft_wrap=not console.is_terminal)
