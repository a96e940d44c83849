"""Bare config names: `--config kto.yaml` finds the configuration that ships with the package."""

from __future__ import annotations

import difflib
from pathlib import Path


class ConfigNotFound(ValueError):
    """A config that is neither a file here nor one that ships."""


def shipped_configs() -> Path:
    """The folder of configurations: inside an installed package, or `configs/` of a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def resolve_configs(argv: list[str]) -> list[str]:
    """Replace the value of every --config that is not a file here by the shipped configuration of that name.

    Raises:
        ConfigNotFound: neither exists; the message names the nearest one that does.
    """
    out = list(argv)
    for i, word in enumerate(argv):
        if word.startswith("--config="):
            out[i] = "--config=" + _find(word.removeprefix("--config="))
        elif word in ("--config", "-c") and i + 1 < len(argv):
            out[i + 1] = _find(argv[i + 1])
    return out


def _find(name: str) -> str:
    if Path(name).is_file() or not name.endswith((".yaml", ".yml")):
        return name
    root = shipped_configs()
    if (root / name).is_file():
        return str(root / name)
    shipped = sorted(str(x.relative_to(root)) for x in root.rglob("*.yaml"))
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"those that ship: {', '.join(shipped)}"
    raise ConfigNotFound(f"--config: no file {name!r} here or among the shipped configurations; {hint}")
