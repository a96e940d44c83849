"""One folder, one run; nothing of another run is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from halos_pl.run_folder import ENV, RunError, claim, find_checkpoint


@pytest.fixture(autouse=True)
def no_inherited_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV, raising=False)
    monkeypatch.setenv(ENV, "")  # put back whatever a claim sets


def new(runs: Path, name: str | None = None, goes_on: bool = False) -> Path:
    """A claim by another process, which inherits no name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENV, "")
        return claim(str(runs), name, "kto", goes_on=goes_on).path


def test_names_are_numbered_and_never_shared(tmp_path: Path) -> None:
    assert [new(tmp_path).name for _ in range(3)] == ["kto", "kto-2", "kto-3"]


def test_ranks_that_are_launched_later_inherit_the_name(tmp_path: Path) -> None:
    first = claim(str(tmp_path), None, "kto", goes_on=False)
    again = claim(str(tmp_path), None, "kto", goes_on=False)
    assert again.path == first.path
    assert not again.claimed


def test_a_run_in_use_is_refused_unless_it_goes_on(tmp_path: Path) -> None:
    (new(tmp_path, "mine") / "config.yaml").touch()
    with pytest.raises(RunError, match="mine holds an earlier run; take another name; it has no checkpoint"):
        new(tmp_path, "mine")
    assert new(tmp_path, "mine", goes_on=True) == tmp_path / "mine"
    (tmp_path / "mine" / "checkpoints" / "last.ckpt").mkdir(parents=True)
    with pytest.raises(RunError, match="--ckpt_path last"):
        new(tmp_path, "mine")


def test_only_a_folder_of_our_own_is_removed(tmp_path: Path) -> None:
    (tmp_path / "runs" / "other").mkdir(parents=True)
    taken = claim(str(tmp_path / "runs"), "other", "kto", goes_on=True)
    taken.release()
    assert (tmp_path / "runs" / "other").is_dir()
    claim(str(tmp_path / "runs"), "mine", "kto", goes_on=False).release()
    assert not (tmp_path / "runs" / "mine").exists()
    assert (tmp_path / "runs").is_dir(), "it holds another run"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/tmp/x"])
def test_names_stay_inside(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected the name of a folder"):
        claim(str(tmp_path), name, "kto", goes_on=False)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(RunError, match="no folder can be made there"):
        new(tmp_path / "runs")


def test_checkpoints_are_found_or_refused(tmp_path: Path) -> None:
    where = tmp_path / "mine" / "checkpoints"
    for step in (3, 20):
        (where / f"step={step}.ckpt").mkdir(parents=True)
        (where / f"step={step}.ckpt" / "manifest.json").touch()
    assert find_checkpoint("last", str(tmp_path), "mine") == where / "step=20.ckpt", "a disk without links"
    (where / "last.ckpt").symlink_to("step=3.ckpt")
    assert find_checkpoint("last", str(tmp_path), "mine") == where / "step=3.ckpt"
    assert find_checkpoint(str(where / "step=3.ckpt"), str(tmp_path), None) == where / "step=3.ckpt"
    for given, name, message in (
        ("last", None, "of which run"),
        ("best", "mine", "no such checkpoint"),
        (str(where / "step=4.ckpt"), "mine", "no checkpoint"),
        (str(where), "mine", "not a checkpoint of this program"),
        ("x" * 5000, "mine", "File name too long"),
    ):
        with pytest.raises(RunError, match=message):
            find_checkpoint(given, str(tmp_path), name)
    (where / "garbage.ckpt").write_bytes(b"garbage")
    with pytest.raises(RunError, match="not a checkpoint"):
        find_checkpoint(str(where / "garbage.ckpt"), str(tmp_path), None)


def test_a_run_that_died_before_its_first_checkpoint(tmp_path: Path) -> None:
    """`last` begins it again, and only where nothing that somebody may want lies in its folder."""
    run = tmp_path / "mine"
    with pytest.raises(RunError, match="no such checkpoint"):
        find_checkpoint("last", str(tmp_path), "mine")
    (run / "checkpoints" / "step=3.ckpt.partial").mkdir(parents=True)
    assert find_checkpoint("last", str(tmp_path), "mine") is None
    with pytest.raises(RunError, match="take another name; it has no checkpoint: --ckpt_path last begins it again"):
        new(tmp_path, "mine")
    with pytest.raises(RunError, match="no such checkpoint"):
        find_checkpoint("best", str(tmp_path), "mine")
    for name in ("policy", "predictions.jsonl"):
        (run / name).mkdir()
        with pytest.raises(RunError, match="no such checkpoint"):
            find_checkpoint("last", str(tmp_path), "mine")
        (run / name).rmdir()
    (run / "config.yaml").write_text("trainer:\n  enable_checkpointing: false\n")
    with pytest.raises(RunError, match="no such checkpoint"):
        find_checkpoint("last", str(tmp_path), "mine")
    (run / "config.yaml").write_text("trainer:\n  enable_checkpointing: null\n")
    assert find_checkpoint("last", str(tmp_path), "mine") is None
    (run / "checkpoints" / "step=2.ckpt").mkdir()
    with pytest.raises(RunError, match="not a checkpoint of this program"):
        find_checkpoint("last", str(tmp_path), "mine")
