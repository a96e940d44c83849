"""A checkpoint is whole or none, and what is damaged or foreign is refused in one message. Truth: random tensors."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halos_pl.checkpoints import CheckpointError, FolderIO, files, folder, open_checkpoint, save_checkpoint, tensors
from halos_pl.checkpoints.files import checksum, manifest_checksum

TENSORS = "tensors-00000-of-00001.safetensors"


def state(seed: int = 0, size: int = 5) -> dict[str, Any]:
    """A checkpoint as Lightning hands it over, of AdamW and of SGD without momentum."""
    g = torch.Generator().manual_seed(seed)
    adam = {"step": torch.tensor(7.0), "exp_avg": torch.randn(size, 3, generator=g), "plain": 2}
    return {
        "global_step": 7,
        "epoch": 1,
        "state_dict": {
            "w": torch.randn(size, 3, generator=g),
            "turned": torch.randn(4, size, generator=g).T,
            "half": torch.randn(size, generator=g).bfloat16(),
            "scale": torch.tensor(2.5),
            "none": torch.empty(0, 2),
        },
        "optimizer_states": [
            {"state": {0: adam, 2: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]},
            {"state": {}, "param_groups": [{"lr": 0.2, "params": [0]}]},
        ],
        "callbacks": {"EarlyStopping": {"wait_count": 2, "best_score": torch.tensor(0.25)}},
        "loops": {"fit_loop": {"done": [1, (2, 3), None, True, "x"]}},
        "trained": ["w", "turned", "half"],
    }


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step=7.ckpt"
    save_checkpoint(state(), path)
    return path


def test_round_trip(saved: Path) -> None:
    assert alike(open_checkpoint(saved).load(), state())
    assert open_checkpoint(saved).step == 7
    assert sorted(x.name for x in saved.iterdir()) == ["manifest.json", "rest.pt", TENSORS]
    assert [x.name for x in saved.parent.iterdir()] == ["step=7.ckpt"], "nothing is left beside it"


def test_lightning_saves_and_loads_it_too(tmp_path: Path) -> None:
    io = FolderIO()
    io.save_checkpoint(state(3), tmp_path / "epoch=0.ckpt")
    assert alike(io.load_checkpoint(tmp_path / "epoch=0.ckpt"), state(3))
    weights = {key: value for key, value in state().items() if key != "optimizer_states"}
    io.save_checkpoint(weights, tmp_path / "weights.ckpt")
    assert alike(io.load_checkpoint(tmp_path / "weights.ckpt")["state_dict"], state()["state_dict"])
    io.remove_checkpoint(tmp_path / "epoch=0.ckpt")
    assert [x.name for x in tmp_path.iterdir()] == ["weights.ckpt"]


def test_one_of_the_same_name_is_replaced(saved: Path) -> None:
    (saved / "left-over").touch()
    save_checkpoint(state(1), saved)
    assert alike(open_checkpoint(saved).load(), state(1))
    assert [x.name for x in saved.parent.iterdir()] == ["step=7.ckpt"]
    link = saved.with_name("step=8.ckpt")
    link.symlink_to(saved.name)
    save_checkpoint(state(2), link)
    assert not link.is_symlink()
    assert alike(open_checkpoint(saved).load(), state(1)), "what a link named stays"


# ------------------------------------------------------------------------------------------------ damage

Damage = Callable[[Path], object]


def rewrite(path: Path, **changed: Any) -> None:
    """A manifest that says something else, with the right checksum of its own."""
    told = json.loads((path / "manifest.json").read_text()) | changed
    told = {key: value for key, value in told.items() if value is not ...}
    told["crc32"] = manifest_checksum(told)
    (path / "manifest.json").write_text(json.dumps(told))


def trusted(path: Path, content: bytes) -> None:
    """Another rest.pt, with the right checksum: by somebody who means harm."""
    (path / "rest.pt").write_bytes(content)
    told = json.loads((path / "manifest.json").read_text())["files"]
    size = {"bytes": len(content), "crc32": checksum(path / "rest.pt")}
    rewrite(path, files=told | {"rest.pt": size})


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def bomb_in_zip(path: Path) -> None:
    torch.save({"callbacks": Bomb()}, path / "rest.pt")
    trusted(path, (path / "rest.pt").read_bytes())


def cut(name: str) -> Damage:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size // 2)


def loop(name: str) -> Damage:
    def harm(path: Path) -> None:
        (path / name).unlink()
        (path / name).symlink_to(name)

    return harm


def as_folder(path: Path) -> None:
    (path / "rest.pt").unlink()
    (path / "rest.pt").mkdir()


def text(content: str) -> Damage:
    return lambda path: (path / "manifest.json").write_text(content)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "tensors cut": (cut(TENSORS), f"{TENSORS} has [0-9,]+ bytes of [0-9,]+"),
    "rest cut": (cut("rest.pt"), r"rest\.pt has [0-9,]+ bytes of"),
    "manifest cut": (cut("manifest.json"), r"manifest\.json cannot be read"),
    "no tensors": (lambda path: (path / TENSORS).unlink(), f"{TENSORS} is missing"),
    "no rest": (lambda path: (path / "rest.pt").unlink(), r"rest\.pt is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"is not a checkpoint.*no manifest\.json"),
    "rest is a folder": (as_folder, r"rest\.pt is missing"),
    "loop of links": (loop(TENSORS), f"{TENSORS} is missing"),
    "manifest, loop of links": (loop("manifest.json"), r"is not a checkpoint|manifest\.json cannot be read"),
    "garbage": (text("garbage"), r"manifest\.json cannot be read"),
    "no text": (lambda path: (path / "manifest.json").write_bytes(b"\xff\x00"), r"manifest\.json cannot be read"),
    "empty": (text(""), r"manifest\.json cannot be read"),
    "a list": (text("[]"), r"manifest\.json cannot be read"),
    "null": (text("null"), r"manifest\.json cannot be read"),
    "deep": (text("[" * 100_000), r"manifest\.json cannot be read"),
    "newer": (lambda p: rewrite(p, format=2, halos_pl="9.1"), r"was written by halos-pl 9\.1, a newer one"),
    "format of text": (lambda p: rewrite(p, format="1"), r"manifest\.json cannot be read"),
    "no format": (lambda p: rewrite(p, format=...), r"manifest\.json cannot be read"),
    "no files": (lambda p: rewrite(p, files=...), r"manifest\.json cannot be read"),
    "files listed": (lambda p: rewrite(p, files=["rest.pt"]), r"manifest\.json cannot be read"),
    "files without rest": (lambda p: rewrite(p, files={}), r"manifest\.json cannot be read"),
    "sizes of text": (
        lambda p: rewrite(p, files={"rest.pt": {"bytes": "1", "crc32": 1}}),
        r"manifest\.json cannot be read",
    ),
    "no sizes": (lambda p: rewrite(p, files={"rest.pt": 3}), r"manifest\.json cannot be read"),
    "a file elsewhere": (
        lambda p: rewrite(p, files={"rest.pt": {"bytes": 1, "crc32": 1}, "../x": {"bytes": 1, "crc32": 1}}),
        r"manifest\.json cannot be read",
    ),
    "step of text": (lambda p: rewrite(p, global_step="soon"), r"manifest\.json cannot be read"),
    "bomb": (lambda p: trusted(p, pickle.dumps(Bomb(), protocol=2)), r"rest\.pt cannot be read"),
    "bomb in torch's form": (bomb_in_zip, r"rest\.pt cannot be read"),
    "no pickle": (lambda p: trusted(p, b"garbage"), r"rest\.pt cannot be read"),
    "empty rest": (lambda p: trusted(p, b""), r"rest\.pt cannot be read"),
    "rest of numbers": (lambda p: trusted(p, pickle.dumps([1, 2], protocol=2)), r"rest\.pt cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_clear_error(name: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    harm, message = DAMAGES[name]
    harm(saved)
    with pytest.raises(CheckpointError, match=message) as told:
        open_checkpoint(saved).load()
    assert str(saved) in str(told.value)
    assert "\n" not in str(told.value)
    assert not (saved.parent / "executed").exists()


def test_the_bomb_would_go_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("name", ["manifest.json", "rest.pt", TENSORS])
def test_a_flipped_bit_anywhere(name: str, saved: Path) -> None:
    """Every bit of the manifest, which no other file vouches for, and some of the others."""
    content = (saved / name).read_bytes()
    bits = range(8 * len(content))
    for bit in bits if name == "manifest.json" else [*bits[:64], *bits[64::997], bits[-1]]:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (saved / name).write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"{name}|newer"):
            open_checkpoint(saved).load()
    (saved / name).write_bytes(content)
    assert alike(open_checkpoint(saved).load(), state())


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_bytes(b"garbage")
    for name in ("empty", "loop", "file", "nowhere"):
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            open_checkpoint(tmp_path / name)


# ------------------------------------------------------------------------------------------------ a write that fails


def full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def of_safetensors(*args: Any, **kwargs: Any) -> Any:
    from safetensors import SafetensorError

    raise SafetensorError("I/O error: No space left on device (os error 28)")


def of_torch(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


FAILURES = [
    (os, "fsync", full_disk),
    (tensors, "save_file", full_disk),
    (tensors, "save_file", of_safetensors),
    (torch, "save", of_torch),
    (folder, "_replace", full_disk),
    (Path, "mkdir", full_disk),
]


@pytest.mark.parametrize(("owner", "name", "failure"), FAILURES, ids=lambda x: getattr(x, "__name__", x))
def test_a_full_disk_leaves_the_last_one(
    owner: Any, name: str, failure: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (saved, saved.with_name("step=8.ckpt")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failure)
            with pytest.raises(CheckpointError, match=r"could not be written; the last one is kept: .*(space|failed)"):
                save_checkpoint(state(1), path)
    assert [x.name for x in saved.parent.iterdir()] == ["step=7.ckpt"]
    assert alike(open_checkpoint(saved).load(), state())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(path)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_real_disk_that_is_full(small_disk: Path) -> None:
    """However much is left, down to nothing: it ends among the tensors, in the rest, or at the manifest."""
    first, filler = small_disk / "step=7.ckpt", small_disk / "filler"
    save_checkpoint(state(0, 900), first)
    pages = sum(-(-x.stat().st_size // 4096) for x in first.iterdir())
    free = os.statvfs(small_disk).f_bavail
    for left in range(pages):
        filler.write_bytes(b"x" * 4096 * (free - left))
        with pytest.raises(CheckpointError, match=r"step=8\.ckpt could not be written; the last one is kept: "):
            save_checkpoint(state(1, 900), small_disk / "step=8.ckpt")
        assert {x.name for x in small_disk.iterdir()} == {"step=7.ckpt", "filler"}
    assert alike(open_checkpoint(first).load(), state(0, 900))
    filler.unlink()
    save_checkpoint(state(1, 900), first)
    assert alike(open_checkpoint(first).load(), state(1, 900))


def test_what_could_not_be_read_again_is_not_written(saved: Path) -> None:
    """A callback with an object in its state: told at the first checkpoint, not at the resume."""
    wrong = state(1)
    wrong["callbacks"] |= {"Mine": {"where": Path("x")}}
    with pytest.raises(CheckpointError, match="the state of Mine holds other objects than tensors"):
        save_checkpoint(wrong, saved)
    wrong = state(1) | {"extra": Path("x")}
    with pytest.raises(CheckpointError, match="the state of the run holds other objects"):
        save_checkpoint(wrong, saved)
    assert alike(open_checkpoint(saved).load(), state())


def test_it_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the last moment nothing has its name; then all of it lies on the disk."""
    path, order = tmp_path / "step=7.ckpt", []
    fsync, rename = os.fsync, Path.rename

    def synced(file: int) -> None:
        assert not path.exists() or order[-1] == "renamed"
        order.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    def renamed(self: Path, target: Path) -> Path:
        assert not path.exists()
        order.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    save_checkpoint(state(), path)
    assert order == [TENSORS, "rest.pt", "manifest.json", "renamed", tmp_path.name]


def test_checksums_are_those_of_zlib(saved: Path) -> None:
    told = json.loads((saved / "manifest.json").read_text())
    for name, size in told["files"].items():
        content = (saved / name).read_bytes()
        assert size == {"bytes": len(content), "crc32": zlib.crc32(content)}
    assert files.checksum(saved / "rest.pt") == told["files"]["rest.pt"]["crc32"]
