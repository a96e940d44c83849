"""`python -m halos_pl data inspect`: show what a training would see of some data, before it starts.

It takes the options of the data as `fit` does, and a configuration of `fit`'s, of which it reads the data and from
the module the objective, the tokenizer and the model's positions.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt
from rich.console import Console

from halos_pl import losses
from halos_pl.config_files import ConfigNotFound, resolve_configs
from halos_pl.data import AlignmentData, DataError
from halos_pl.inspect import examples, subject
from halos_pl.inspect.advice import advise
from halos_pl.inspect.facts import Facts, gather
from halos_pl.inspect.page import page
from halos_pl.inspect.text import show
from halos_pl.losses import Objective
from halos_pl.models import ModelError
from halos_pl.objective_choice import own_defaults
from halos_pl.parser_errors import Parser, UsageError, explain
from halos_pl.quiet import quieten

MODEL = ("objective", "policy", "config", "tokenizer", "trust_remote_code")
"""Keys of the module that say how data are read."""
OTHERS = (
    "trainer",
    "evaluation",
    "checkpoints",
    "guards",
    "seed_everything",
    "name",
    "runs",
    "ckpt_path",
    "weights_only",
)
"""Sections of a configuration of `fit`'s that say nothing about the data."""
HELP = """\
usage: python -m halos_pl data inspect --data.train FILE [--config FILE ...] [--KEY VALUE ...]

  inspect    what a training would see of these rows: counts, lengths, what is cut, what looks wrong, and examples

`python -m halos_pl data inspect --help` lists every key. The exit status is 1 where rows cannot be used.
"""
_CLASSES = {"model.objective": {x.__name__: x for x in losses.OBJECTIVES}}


def main(argv: list[str]) -> int:
    """Run `data COMMAND`.

    Returns:
        0; 1 where rows cannot be used; 2 for a mistake of the user's, told on stderr in one message.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    try:
        if argv[0] != "inspect":
            raise UsageError(f"data: unknown command {argv[0]!r}; there is inspect")
        return inspect(argv[1:])
    except (UsageError, ConfigNotFound, DataError, ModelError) as error:
        print(f"halos_pl: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the report has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def inspect(argv: list[str]) -> int:
    """Print a report, or write it.

    Raises:
        UsageError: of options and configurations.
        DataError, ModelError: of data and models that cannot be used.
    """
    quieten()
    options, data = parse(argv)
    try:
        found = subject.read(data, options.model.as_dict() | {"objective": options.model.objective}, options.split_of)
    except (DataError, ModelError):
        raise
    except ValueError as error:  # of tokenizers, templates and lengths
        raise UsageError(str(error)) from error
    facts = report(found, options.examples)
    if options.html is not None:
        path = Path(options.html).expanduser()
        try:
            path.write_text(page(facts), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UsageError(f"--html: {error}") from error
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        console = Console(highlight=False)
        show(facts, console)
        if options.html is not None:
            console.print(f"\npage  {options.html}", soft_wrap=True, markup=False)
    return 1 if facts["bad_rows"]["rows"] else 0


def report(found: subject.Subject, count: int) -> Facts:
    """All that is told of the rows, with so many examples."""
    facts = gather(found)
    return {"warnings": advise(facts), **facts, "examples": examples.render(found, count)}


def parse(argv: list[str]) -> tuple[Any, AlignmentData]:
    """The options, the objective among them as an instance, and the data module that they make.

    Raises:
        UsageError: what is wrong, and the nearest thing that is not.
        ConfigNotFound: no such configuration.
    """
    own = parser()
    words = [_renamed(word) for word in argv]
    try:
        options = own.parse_args(own_defaults(_with_configs(resolve_configs(words))))
        made = own.instantiate_classes(options)
    except UsageError as error:
        told = explain(str(error), own, _CLASSES)
        raise UsageError(told.replace("--model.objective:", "--objective:") if words != argv else told) from None
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from error
    return made, made.data


def parser() -> ArgumentParser:
    own = Parser(
        prog="python -m halos_pl data inspect",
        description="What a training would see of these rows: counts, lengths, what is cut, what looks wrong, and "
        "examples. The exit status is 1 where rows cannot be used (--data.on_bad_row is skip here), 2 for mistakes.",
        allow_abbrev=False,
    )
    add = own.add_argument
    add("--config", "-c", action="config", help="A configuration of fit's, or one that ships.")
    add("--model.objective", "--objective", type=Objective | None, default=None,
        help="How rows are read: KTO, DPO, SFT, ... Default: as most of them are.")  # fmt: skip
    add("--model.policy", type=str | None, default=None, help="Whose tokenizer and positions are meant.")
    add("--model.config", type=str | dict[str, Any] | None, default=None, help="The same, of random weights.")
    add("--model.tokenizer", type=str | None, default=None, help="Folder or hub name. Default: the policy's.")
    add("--model.trust_remote_code", type=bool, default=False, help="Run code that folder or hub brings.")
    add("--split-of", choices=("train", "validation", "test"), default="train", help="Whose rows to inspect.")
    add("--examples", type=NonNegativeInt, default=3, help="Rows that are shown token by token.")
    add("--html", type=str | None, default=None, metavar="FILE", help="Write the report as a page, too.")
    add("--json", action="store_true", help="Print one JSON object instead.")
    own.add_class_arguments(AlignmentData, "data", fail_untyped=False)
    own.set_defaults({"data.on_bad_row": "skip"})
    return own


def _renamed(word: str) -> str:
    """`--objective` is short for `--model.objective`."""
    short = word == "--objective" or word.startswith(("--objective=", "--objective."))
    return f"--model.{word.removeprefix('--')}" if short else word


def _with_configs(argv: list[str]) -> list[str]:
    """Each configuration replaced by what it says about the data."""
    out = list(argv)
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in ("--config", "-c"):
            if equals:
                out[i] = f"{name}={_relevant(value)}"
            elif i + 1 < len(argv):
                out[i + 1] = _relevant(argv[i + 1])
    return out


def _relevant(name: str) -> str:
    try:
        content = yaml.safe_load(Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--config: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config: {name} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config: {name} holds {type(content).__name__}, not the sections of a configuration")
    kept: dict[str, Any] = {key: value for key, value in content.items() if key not in OTHERS}
    if isinstance(kept.get("model"), dict):
        kept["model"] = {key: value for key, value in kept["model"].items() if key in MODEL}
    if isinstance(content.get("seed_everything"), int) and isinstance(kept.get("data", {}), dict):
        kept["data"] = {"seed": content["seed_everything"], **kept.get("data", {})}
    return json.dumps(kept)
