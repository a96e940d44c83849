"""A checkpoint is a folder: tensors, the rest of the state, and a manifest with sizes and checksums.

    step=40.ckpt/
        manifest.json                          version, step, and of every file its size and checksum; written last
        rest.pt                                loops, schedules, callbacks; read without unpickling objects
        tensors-00000-of-00002.safetensors     trained parameters and optimizer state, rows of rank 0 …

It is written under another name and renamed, so that it appears whole or not at all. Nothing in it is unpickled
(torch's own distributed checkpoints keep their index as a pickle).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from halos_pl import __version__
from halos_pl.checkpoints.errors import CheckpointError
from halos_pl.checkpoints.files import checksum, manifest_checksum, refuse_objects, settled
from halos_pl.checkpoints.tensors import TensorFiles, write_tensors
from halos_pl.parallel import like, local_rows

FORMAT = 1
MANIFEST, REST = "manifest.json", "rest.pt"
ASIDE = ".partial"
"""End of the name of a folder that is being written."""
ELSE = "the checkpoint is damaged; take an earlier one"


def save_checkpoint(
    checkpoint: Mapping[str, Any], path: Path, *, full: bool = True, together: bool | None = None
) -> None:
    """Write what Lightning gathered of a run.

    Args:
        checkpoint: with `state_dict` and, as torch has them, `optimizer_states`; tensors may be sharded.
        path: of the folder; one of the same name is replaced.
        full: the first rank gathers and writes all tensors, instead of each rank its share.
        together: all ranks take part. Default: where there is more than one.

    Raises:
        CheckpointError: on every rank, where one could not write.
    """
    together = dist.is_initialized() if together is None else together
    aside = path.with_name(path.name + ASIDE)
    rest, tensors = _parted(checkpoint)
    rank = dist.get_rank() if together else 0
    files: dict[str, dict[str, int]] = {}

    def prepare() -> None:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def write() -> None:
        if (written := write_tensors(tensors, aside, full=full)) is not None:
            files[written.name] = settled(written)
        if rank == 0:
            torch.save(rest, aside / REST)
            refuse_objects(rest, aside / REST)
            files[REST] = settled(aside / REST)

    def finish() -> None:
        if rank == 0:
            step = checkpoint.get("global_step", 0)
            told = {"format": FORMAT, "halos_pl": __version__, "global_step": step, "files": files}
            told["crc32"] = manifest_checksum(told)
            (aside / MANIFEST).write_text(json.dumps(told, indent=1), encoding="utf-8")
            settled(aside / MANIFEST)
            _replace(aside, path)

    try:
        _all(prepare, path, together)
        files = _merged(_all(write, path, together, lambda: files))
        _all(finish, path, together)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _parted(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Without its tensors, and those by name."""
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    rest["optimizer_states"] = []
    for i, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        plain: dict[int, dict[str, Any]] = {}
        for p, values in optimizer["state"].items():
            plain[p] = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
            found = {key: value for key, value in values.items() if isinstance(value, Tensor)}
            tensors |= {f"optimizer.{i}.{p}.{key}": value for key, value in found.items()}
        rest["optimizer_states"].append({**optimizer, "state": plain})
    return rest, tensors


def _all(work: Callable[[], None], path: Path, together: bool, told: Callable[[], Any] = lambda: None) -> list[Any]:
    """Do something on every rank; where one fails, all raise. Returns what each rank tells."""
    error = None
    try:
        work()
    except Exception as failure:  # whatever it is, the others must not wait for this rank:
        error = f"{type(failure).__name__}: {failure}"
    found: list[Any] = [(error, None if error else told())]
    if together:
        mine, found = found[0], [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
    failed = {rank: why for rank, (why, _) in enumerate(found) if why}
    if failed:
        rank, why = next(iter(failed.items()))
        who = f"rank {rank}: " if len(found) > 1 else ""
        raise CheckpointError(f"the checkpoint {path} could not be written; the last one is kept: {who}{why}")
    return [value for _, value in found]


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: told for part in parts for name, told in part.items()}


def _replace(aside: Path, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        old = path.with_name(path.name + ".old" + ASIDE)
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        aside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
        aside.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Stored:
    """A checkpoint that was read as far as its manifest and the rest of the state.

    Raises:
        CheckpointError: no checkpoint of this library, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if self.manifest["format"] > FORMAT:
                raise CheckpointError(f"{path} was written by halos-pl {self.manifest['halos_pl']}, a newer one")
            self.files: dict[str, dict[str, int]] = self.manifest["files"]
            self.step = int(self.manifest["global_step"])
            if self.manifest["crc32"] != manifest_checksum(self.manifest):
                raise CheckpointError(f"{path / MANIFEST} is not what was written (checksum): {ELSE}")
            if REST not in self.files or any(Path(x).name != x for x in self.files):
                raise ValueError("it names other files than it must")
            if not all(isinstance(told[x], int) for told in self.files.values() for x in ("bytes", "crc32")):
                raise ValueError("sizes and checksums must be numbers")
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is not a checkpoint: it has no {MANIFEST}") from error
        except CheckpointError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path / MANIFEST} cannot be read: {error!r}") from error

    def verify(self, *, share: tuple[int, int] = (0, 1)) -> None:
        """Compare sizes, and of each world-th file from the rank-th on the checksum, with the manifest.

        Args:
            share: (rank, world).

        Raises:
            CheckpointError: naming the file that differs.
        """
        for i, (name, told) in enumerate(sorted(self.files.items())):
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size != told["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes of {told['bytes']:,}"
                raise CheckpointError(f"{file} {found}: {ELSE}")
            if i % share[1] == share[0] and checksum(file) != told["crc32"]:
                raise CheckpointError(f"{file} is not what was written (checksum): {ELSE}")

    def rest(self) -> dict[str, Any]:
        """All but the tensors."""
        try:
            found: dict[str, Any] = torch.load(self.path / REST, map_location="cpu", weights_only=True)
        except Exception as error:  # of torch, pickle or zipfile, whatever the file holds
            told = str(error).partition("\n")[0]
            raise CheckpointError(f"{self.path / REST} cannot be read: {told}") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path / REST} cannot be read: it holds a {type(found).__name__}")
        return found

    def tensors(self) -> TensorFiles:
        return TensorFiles([self.path / name for name in sorted(self.files) if name.endswith(".safetensors")])

    def load(self, parameters: Mapping[str, nn.Parameter] | None = None) -> dict[str, Any]:
        """The checkpoint as Lightning restores it, verified.

        Args:
            parameters: of the module at hand. Where one is sharded, so are its values and its optimizer state, and only
                the rows that this rank holds are read.

        Raises:
            CheckpointError: damaged; on every rank, where one finds it so.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        _agreed(lambda: self.verify(share=(rank, world)))
        parameters, checkpoint, files = parameters or {}, self.rest(), self.tensors()
        names = [name.removeprefix("model.") for name in files.shapes if name.startswith("model.")]
        checkpoint["state_dict"] = {name: _read(files, f"model.{name}", parameters.get(name)) for name in names}
        trained = [parameters.get(name) for name in checkpoint.get("trained", [])]
        for key in files.shapes:
            if key.startswith("optimizer."):
                _, i, p, value = key.split(".", 3)
                pattern = trained[int(p)] if int(p) < len(trained) else None
                state = checkpoint["optimizer_states"][int(i)]["state"].setdefault(int(p), {})
                state[value] = _read(files, key, pattern)
        return checkpoint


def _read(files: TensorFiles, name: str, pattern: Tensor | None) -> Tensor:
    if isinstance(pattern, DTensor) and list(pattern.shape) == files.shapes[name]:
        return like(files.rows(name, *local_rows(pattern)).to(pattern.to_local().device), pattern)
    return files.rows(name)


def _agreed(check: Callable[[], None]) -> None:
    errors: list[str | None] = [None]
    try:
        check()
    except CheckpointError as found:
        errors = [str(found)]
    if dist.is_initialized():
        mine, errors = errors[0], [None] * dist.get_world_size()
        dist.all_gather_object(errors, mine)
    if wrong := [x for x in errors if x]:
        raise CheckpointError(wrong[0])


def open_checkpoint(path: Path) -> Stored:
    """A checkpoint by its folder, or by a link to it.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no checkpoint: expected a folder with a {MANIFEST}")
    return Stored(path.resolve())


class FolderIO(CheckpointIO):
    """Lightning's checkpoints in this form, for strategies that keep whole models."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        save_checkpoint(checkpoint, Path(path), together=False)  # the strategy calls it on the first rank alone

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        return open_checkpoint(Path(path)).load()

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)
