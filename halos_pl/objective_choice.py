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
CHOICES = (OPTION, f"{OPTION}.class_path")
CONFIGS = ("--config", "-c")
BEGINNING = "KTO"
"""What is chosen before anybody says anything."""


def own_defaults(argv: Sequence[str]) -> list[str]:
    """The command line with the defaults of an objective written out wherever a config or an option changes to it.

    Arguments of the objective that stand on the command line itself (`--model.objective.beta 0.3`) stay as they are,
    before or after the choice.
    """
    prefix = f"{OPTION}."
    given = {
        word.split("=")[0].removeprefix(prefix).removeprefix("init_args.") for word in argv if word.startswith(prefix)
    }
    out: list[str] = []
    chosen, option = _find(BEGINNING), ""
    for word in argv:
        name, _, value = word.partition("=")
        named = name in (*CONFIGS, *CHOICES)
        if named and not value:
            option = name
            out.append(word)
            continue
        option, value, place = (name, value, len(out)) if named else (option, word, len(out) - 1)
        now = _named(value) if option in CHOICES else _of_config(value) if option else None
        objective = None if now is None else _find(now)
        if now is not None and objective is not None and objective is not chosen:
            out[place:place] = [OPTION, _spec(now, objective, given)]  # before the option whose value this is
            chosen = objective
        out.append(word)
        option = ""
    return out


def _find(class_path: str) -> type | None:
    """The class of that name; None for what is no dataclass that can be imported: the parser says what is wrong."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module) if module else losses, name, None)
    except (ImportError, ValueError):
        return None
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


def _spec(class_path: str, objective: type, given: set[str]) -> str:
    """The class with all its defaults but those given, as JSON."""
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
