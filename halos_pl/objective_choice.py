"""Another objective brings its own defaults: what an earlier config said to another one does not carry over.

The parser hands arguments of one class on to the next that is chosen, wherever names agree. For objectives that is a
trap: SLiC's `beta` is a margin in nats, KTO's is not, and each has the default that suits its formula.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from halos_pl import losses

OPTION = "--model.objective"
SOURCES = {
    OPTION: ("model", "objective"),
    f"{OPTION}.class_path": ("model", "objective"),
    "--model": ("model",),
    "--config": (),
    "-c": (),
}
"""What can name an objective, and where in a configuration its value belongs."""
BEGINNING = "KTO"
"""What is chosen before anybody says anything."""


def own_defaults(argv: Sequence[str]) -> list[str]:
    """The command line with the defaults of an objective written out wherever a config or an option changes to it.

    Arguments of the objective that stand on the command line itself (`--model.objective.beta 0.3`) stay as they are,
    before or after the choice.
    """
    fields = (word.split("=")[0].removeprefix(f"{OPTION}.") for word in argv if word.startswith(f"{OPTION}."))
    given = {field.removeprefix("init_args.") for field in fields}
    out: list[str] = []
    chosen, option = _find(BEGINNING), ""
    for word in argv:
        name, _, value = word.partition("=")
        if name in SOURCES and not value:
            option = name
            out.append(word)
            continue
        option, value, place = (name, value, len(out)) if name in SOURCES else (option, word, len(out) - 1)
        now = _named(value, SOURCES[option]) if option else None
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
    except Exception:  # whatever a module of the user's raises
        return None
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


def _spec(class_path: str, objective: type, given: set[str]) -> str:
    """The class with all its defaults but those given, as YAML in one line."""
    values = {
        field.name: list(field.default) if isinstance(field.default, tuple) else field.default
        for field in dataclasses.fields(objective)
        if field.init
        and field.name not in given
        and isinstance(field.default, bool | int | float | str | tuple | None)
        and not isinstance(field.default, enum.Enum)
    }
    spec = {"class_path": class_path, "init_args": values}
    return yaml.safe_dump(spec, default_flow_style=True, width=math.inf).strip()


def _named(text: str, place: tuple[str, ...]) -> str | None:
    """The objective that a value names, be it a name, a configuration, or a file of one; None where it names none."""
    content: Any = text
    try:
        if text.lstrip().startswith("{"):
            content = yaml.safe_load(text)
        elif "objective" not in place:
            content = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
        for key in ("model", "objective")[len(place) :]:
            content = content[key]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None  # the parser says what is wrong
    named = content.get("class_path") if isinstance(content, dict) else content
    return named if isinstance(named, str) else None
