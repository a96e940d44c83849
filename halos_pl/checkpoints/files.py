"""Files of a checkpoint: on the disk, with a checksum, and such as can be read without unpickling objects."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


def settled(path: Path) -> dict[str, int]:
    """Make sure that a file is on the disk, with the mode that new files have here; its size and checksum."""
    mode = os.umask(0)
    os.umask(mode)
    path.chmod(0o666 & ~mode)  # safetensors makes its own for the owner alone
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def manifest_checksum(told: dict[str, Any]) -> int:
    """Checksum of what a manifest says but for this."""
    return zlib.crc32(json.dumps({k: x for k, x in told.items() if k != "crc32"}, sort_keys=True).encode())


def refuse_objects(rest: Mapping[str, Any], path: Path) -> None:
    """ValueError where a file could not be read again, since a callback's state has objects in it."""
    try:
        torch.load(path, weights_only=True)
    except UnpicklingError as error:
        wrong = []
        for name, state in rest.get("callbacks", {}).items():
            torch.save(state, buffer := BytesIO())
            buffer.seek(0)
            try:
                torch.load(buffer, weights_only=True)
            except UnpicklingError:
                wrong.append(name)
        whose = ", ".join(wrong) or "the run"
        raise ValueError(f"the state of {whose} holds other objects than tensors, numbers, texts and lists") from error
