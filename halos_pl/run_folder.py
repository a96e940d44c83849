"""Where a run lives: `runs/NAME/`, claimed by one process, and the checkpoint that a run goes on from."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

ENV = "HALOS_RUN_NAME"
"""Tells the name to the ranks that Lightning launches after the folder was claimed."""

AUTO = "auto"
"""Of `--ckpt_path`: the last checkpoint of the run that is named; where there is none yet, the run begins."""


class RunError(ValueError):
    """The folder or the checkpoint that the user named cannot be used."""


@dataclass(frozen=True)
class RunFolder:
    """A claimed folder.

    Args:
        path: the folder.
        claimed: whether this process made it, and may remove it.
    """

    path: Path
    claimed: bool

    def release(self) -> None:
        """Remove the folder of a run that never began."""
        if self.claimed:
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # not empty: other runs
                self.path.parent.rmdir()


def claim(runs: str, name: str | None, default: str, *, goes_on: bool) -> RunFolder:
    """The folder of a run, made here so that no other run can take it.

    Args:
        runs: folder of all runs.
        name: as the user gave it; None takes the first free one of `default`, `default-2` …
        default: of the name.
        goes_on: whether the run continues in its own folder.

    Raises:
        RunError: the name is in use or no name, or the folder cannot be made.
    """
    if name is not None and (not name or name in (".", "..") or Path(name).name != name):
        raise RunError(f"--name {name!r}: expected the name of a folder in {runs}/, without slashes")
    name = os.environ.get(ENV) or name
    if getattr(rank_zero_only, "rank", 0):  # only rank 0 writes
        return RunFolder(Path(runs, name or default), claimed=False)
    names = (default if i == 1 else f"{default}-{i}" for i in count(1)) if name is None else iter([name])
    try:
        for candidate in names:
            path = Path(runs, candidate)
            if goes_on or (name is not None and path.is_dir() and not any(path.iterdir())):
                return RunFolder(path, claimed=False)
            with suppress(FileExistsError):
                path.mkdir(parents=True)
                os.environ[ENV] = candidate
                return RunFolder(path, claimed=True)
    except OSError as error:
        raise RunError(f"--runs {runs}: no folder can be made there: {error}") from error
    going_on = "go on with it (--ckpt_path last), or " if (path / "checkpoints" / "last.ckpt").is_dir() else ""
    again = "; it has no checkpoint: --ckpt_path last begins it again" if died_early(path) else ""
    raise RunError(f"--name: {path} holds an earlier run; {going_on}take another name{again}")


def died_early(path: Path) -> bool:
    """Whether a run ended before its first checkpoint, so that it may take its folder again: nothing is lost there."""
    if not path.is_dir() or steps_of(path / "checkpoints"):
        return False
    if (path / "policy").exists() or (path / "predictions.jsonl").exists():
        return False
    config = path / "config.yaml"
    return not config.is_file() or "enable_checkpointing: false" not in config.read_text(encoding="utf-8")


def steps_of(folder: Path) -> dict[int, Path]:
    """The whole checkpoints of a run, by their steps, without links."""
    found = (x for x in folder.glob("step=*.ckpt") if not x.is_symlink())
    return {int(x.name[5:-5]): x for x in found if x.name[5:-5].isdecimal()}


def find_checkpoint(given: str, runs: str, name: str | None) -> Path | None:
    """The folder of `--ckpt_path`: a path, or `last` or `best` of the run that is named; for `auto` the last one.

    Returns:
        None for `last` of a run that ended before its first checkpoint, and for `auto` before there is any.

    Raises:
        RunError: there is none, or it is no checkpoint.
    """
    path = Path(given)
    if given in ("last", "best", AUTO):
        if name is None:
            raise RunError(f"--ckpt_path {given}: of which run? Name it with --name")
        where, which = Path(runs, name, "checkpoints"), "last" if given == AUTO else given
        path = where / f"{which}.ckpt"
        if which == "last" and not path.is_dir():  # a disk without links
            path = max(steps_of(where).items(), default=(0, path))[1]
        if which == "last" and died_early(Path(runs, name)):
            return None
        if not path.is_dir():
            if given == AUTO and not Path(runs, name, "policy").exists():
                return None
            raise RunError(f"--ckpt_path {given}: {Path(runs, name)} holds no such checkpoint")
    try:
        if not path.exists():
            raise RunError(
                f"--ckpt_path: no checkpoint {given!r}; give its folder, or `last`, `best` or `auto` of a run"
            )
        if not (path / "manifest.json").is_file():
            raise RunError(f"--ckpt_path: {given} is not a checkpoint of this program: it has no manifest.json")
    except OSError as error:
        raise RunError(f"--ckpt_path: {error}") from error
    return path.resolve()
