"""Another objective brings its own defaults: what an earlier config said to another one does not carry over.

The parser hands arguments of one class on to the next that is chosen, wherever names agree. For objectives that is a
trap: SLiC's `beta` is a margin in nats, KTO's is not, and each has the default that suits its formula.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from halos_pl import losses

OPTION = "--model.objective"
BEGINNING = "KTO"
"""What is chosen before anybody says anything."""


def own_defaults(argv: Sequence[str]) -> list[str]:
    """The command line with the defaults of an objective written out wherever a config or an option changes to it.

    Arguments of the objective that stand on the command line itself (`--model.objective.beta 0.3`) stay as they are,
    before or after the choice.
    """
    given = {word.split("=")[0].removeprefix(f"{OPTION}.") for word in argv if word.startswith(f"{OPTION}.")}
    out: list[str] = []
    chosen, option = BEGINNING, ""
    for word in argv:
        name, _, value = word.partition("=")
        if name in ("--config", "-c", OPTION) and not value:
            option = name
            out.append(word)
            continue
        if name in ("--config", OPTION) and value:
            now = _named(value) if name == OPTION else _of_config(value)
            place = len(out)
        else:
            now = None if not option else _named(word) if option == OPTION else _of_config(word)
            place = len(out) - 1  # before the option whose value this is
        if now is not None and _short(now) != _short(chosen):
            if (spec := _spec(now, given)) is not None:
                out[place:place] = [OPTION, spec]
            chosen = now
        out.append(word)
        option = ""
    return out


def _spec(class_path: str, given: set[str]) -> str | None:
    """The class with all its defaults but those given, as JSON; None for what is no dataclass that can be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        objective = getattr(importlib.import_module(module) if module else losses, name, None)
    except ImportError:
        return None
    if not (isinstance(objective, type) and dataclasses.is_dataclass(objective)):
        return None
    values = {
        field.name: field.default
        for field in dataclasses.fields(objective)
        if field.name not in given and field.default is not dataclasses.MISSING
    }
    return json.dumps({"class_path": class_path, "init_args": values})


def _of_config(path: str) -> str | None:
    """The objective that a config names; None where it names none or is no config: the parser says what is wrong."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return _named(content["model"]["objective"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None


def _named(objective: object) -> str | None:
    """The class of a name, or of a mapping with `class_path` (as text too)."""
    if isinstance(objective, str) and objective.lstrip().startswith("{"):
        try:
            objective = yaml.safe_load(objective)
        except yaml.YAMLError:
            return None
    named = objective.get("class_path") if isinstance(objective, dict) else objective
    return named if isinstance(named, str) else None


def _short(class_path: str) -> str:
    return class_path.removeprefix("halos_pl.losses.")
