"""The parser's messages in the user's words: the key, what it got, what was expected, and the nearest valid name."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import NoReturn

from jsonargparse import ArgumentParser

SOURCE_KEYS = ("path", "reader", "split", "limit", "weight", "threshold", "columns", "streaming")
LORA_KEYS = ("r", "alpha", "dropout", "target_modules", "rslora", "adapter", "quantize")
Choices = Mapping[str, Mapping[str, type]]
"""Keys whose value is a class chosen by name, with the classes by name."""


class UsageError(Exception):
    """A mistake on the command line or in a configuration, explained in one message."""


class Parser(ArgumentParser):
    """Raises UsageError where jsonargparse would end the process."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(message)


def explain(message: str, parser: ArgumentParser, choices: Choices) -> str:
    """One message for an error of the parser.

    Args:
        message: what the parser said.
        parser: of the subcommand, whose options are the valid keys.
        choices: classes that a key selects; their parameters are valid keys below it.
    """
    keys, message = sorted(_keys(parser, choices)), _inside_lora(message)
    if told := of_a_source(message):
        return told
    if unknown := re.search(r"unrecognized arguments: --(\S+?)(?:[= ]|$)", message):
        return _unknown(unknown[1], keys, choices)
    if unknown := re.search(r"Option '([^']+)' is not accepted|does not accept option '([^']+)'", message):
        return _unknown(unknown[1] or unknown[2], keys, choices)
    if not (at := re.search(r'(?:Parser key|Key) "([^"]+)"', message)):
        return message.strip()
    key = at[1] if at[1] in keys else next((x for x in keys if x.endswith(f".{at[1]}")), at[1])
    got = re.search(r"(?:Got|Given) value: (.*)", message)
    value = got[1].strip().strip("'\"") if got else ""
    if key == "model.lora":
        return f"--{key}: got {value!r}; it takes {_listed(LORA_KEYS)}, as in --model.lora.r 16"
    if key in choices and (own := re.search(r"Problem with given class_path '([^']+)':\s*(.*)", message, re.DOTALL)):
        return f"--{key}: {own[1]!r}: {' '.join(own[2].split())}; a class of your own is FILE.NAME, of this folder"
    if key in choices:
        value = ((wrong := re.search(r"Expected a dot import path string: (\S+)", message)) and wrong[1]) or value
        return f"--{key}: no class {value!r} there{_nearest(value, choices[key])}; it takes {_listed(choices[key])}"
    if allowed := re.findall(r"'([^']+)'", " ".join(re.findall(r"Literal\[(.*?)\]", message))):
        return f"--{key}: got {value!r}{_nearest(value, allowed)}; it takes {_listed(dict.fromkeys(allowed))}"
    if kinds := re.findall(r"Expected an? <class '([^']+)'>", message):
        names = [{"NoneType": "null", "tuple": "a list such as '[-1.0, 1.5]'"}.get(x, x) for x in dict.fromkeys(kinds)]
        return f"--{key}: got {value!r}, expected {' or '.join(names)}"
    return f"--{key}: " + " ".join(message[at.end() :].split()).lstrip(": ")


def of_a_source(message: str) -> str | None:
    """What `Source` says of its values, out of the parser's words about all forms that it may have; `LoRA` too."""
    if told := re.search(r"^\s*- (lora\.\w+ .*)$", message, re.MULTILINE):
        return f"--model.{told[1]}"
    told = re.search(rf"^\s*- ((?:{'|'.join(SOURCE_KEYS)}): .*)$", message, re.MULTILINE)
    return told and f"a source of data: {told[1]}"


def _inside_lora(message: str) -> str:
    """Of a key below `model.lora`, which may also be null: as if the key stood alone, with its whole name."""
    body = message.rpartition("- Expected a <class 'NoneType'>")[0]
    if not re.search(r'(?:Parser key|Key) "model\.lora":', body):
        return message
    if inner := re.search(r'(?:Parser key|Key) "(\w+)"', body):
        return f'Parser key "model.lora.{inner[1]}"' + body[inner.end() :]
    unknown = re.search(r"Option '(\w+)' is not accepted", body)
    return f"Option 'model.lora.{unknown[1]}' is not accepted" if unknown else message


def _keys(parser: ArgumentParser, choices: Choices) -> set[str]:
    keys = {name.removeprefix("--") for action in parser._actions for name in action.option_strings if name[:2] == "--"}
    for key, classes in choices.items():
        for choice in classes.values():
            keys |= {f"{key}.{name}" for name in _parameters(choice)}
    keys |= {f"data.{part}.{name}" for part in ("train", "validation", "test") for name in SOURCE_KEYS}
    keys |= {f"model.lora.{name}" for name in LORA_KEYS}
    return {key for key in keys if not key.endswith("+")}


def _unknown(name: str, keys: Iterable[str], choices: Choices) -> str:
    """A whole key, or (out of a class's parameters) only its last part."""
    if "." in name:
        return f"unknown key --{name}{_nearest(name, keys)}"
    if owners := [x for classes in choices.values() for x in classes if name in _parameters(classes[x])]:
        return f"key {name!r} is a parameter of {_listed(owners)}, not of the class that is chosen"
    leaves: dict[str, list[str]] = {}
    for key in keys:
        leaves.setdefault(key.rsplit(".", 1)[-1], []).append(f"--{key}")
    near = difflib.get_close_matches(name, leaves, n=1)
    return f"unknown key {name!r}" + (f"; did you mean {' or '.join(leaves[near[0]])}?" if near else "")


def _parameters(choice: type) -> list[str]:
    return [name for name in inspect.signature(choice).parameters if name != "params"]


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
