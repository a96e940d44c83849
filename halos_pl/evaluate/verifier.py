"""Verifiers: functions of the user's that say whether a completion is right."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from halos_pl.data.records import DataError
from halos_pl.evaluate.prompts import Prompt

Verifier = Callable[[Mapping[str, Any], str], bool]
"""Called with the row that the prompt stood in, as it was read, and the text of the completion."""


def find_verifier(path: str) -> Verifier:
    """The function that an import path names, `module.function`; modules of the working folder are found too.

    Raises:
        ValueError: no such module or function, or one that fails to import.
    """
    module, _, name = path.rpartition(".")
    expected = "expected module.function, such as halos_pl.nano.granted; a file checks.py here is the module checks"
    if not module or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"evaluation.verifier {path!r}: no import path; {expected}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module of the user's: whatever it raises is about this path
        raise ValueError(f"evaluation.verifier {path!r}: {type(error).__name__}: {error}; {expected}") from error
    if not callable(found):
        raise ValueError(f"evaluation.verifier {path!r}: a {type(found).__name__}, not a function; {expected}")
    return found


def verdict(verifier: Verifier, prompt: Prompt, completion: str) -> bool:
    """What a verifier says of a completion.

    Raises:
        DataError: it fails, or returns something that is neither true nor false.
    """
    try:
        found = verifier(dict(prompt.row), completion)
    except Exception as error:  # the user's program
        raise DataError(
            f"evaluation.verifier fails on {prompt.origin}: {type(error).__name__}: {error} (its completion: "
            f"{completion[:80]!r})"
        ) from error
    if not isinstance(found, bool | np.bool_):
        raise DataError(f"evaluation.verifier returns {found!r} on {prompt.origin}; expected True or False")
    return bool(found)
