"""Bare config names, and what wins where a file of that name lies here."""

from __future__ import annotations

from pathlib import Path

import pytest

from halos_pl import config_files
from halos_pl.config_files import ConfigNotFound, resolve_configs, shipped_configs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that is not the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["kto.yaml", "dpo.yaml", "model/tiny-llama.yaml"])
def test_bare_names_find_what_ships(name: str) -> None:
    shipped = str(shipped_configs() / name)
    assert Path(shipped).is_file()
    assert resolve_configs(["fit", "--config", name, "--name", "x"]) == ["fit", "--config", shipped, "--name", "x"]
    assert resolve_configs(["fit", "-c", name]) == ["fit", "-c", shipped]
    assert resolve_configs(["fit", f"--config={name}"]) == ["fit", f"--config={shipped}"]


def test_every_config_of_several_is_resolved() -> None:
    root = shipped_configs()
    argv = ["fit", "--config", "sft.yaml", "--config=model/tiny-llama.yaml"]
    given = list(argv)
    assert resolve_configs(argv) == ["fit", "--config", f"{root}/sft.yaml", f"--config={root}/model/tiny-llama.yaml"]
    assert argv == given, "the caller's list is left as it is"


def test_a_file_here_wins(elsewhere: Path) -> None:
    (elsewhere / "model").mkdir()
    for name in ("kto.yaml", "mine.yml", "model/tiny-llama.yaml"):
        (elsewhere / name).touch()
        assert resolve_configs(["--config", name]) == ["--config", name]
        assert resolve_configs([f"--config={elsewhere / name}"]) == [f"--config={elsewhere / name}"]


def test_a_folder_of_that_name_is_no_file(elsewhere: Path) -> None:
    (elsewhere / "kto.yaml").mkdir()
    assert resolve_configs(["--config", "kto.yaml"]) == ["--config", str(shipped_configs() / "kto.yaml")]


@pytest.mark.parametrize(
    "argv",
    [
        ["fit"],
        ["fit", "--config"],  # its value is missing: the parser's to say
        ["fit", "--config", "model: {dtype: float64}"],  # YAML itself
        ["fit", "--data.train", "kto.yaml"],
        ["fit", "--configs", "kto.yaml"],
    ],
)
def test_all_else_is_left_alone(argv: list[str]) -> None:
    assert resolve_configs(argv) == argv


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("kot.yaml", "did you mean 'kto.yaml'?"),
        ("model/tinyllama.yaml", "did you mean 'model/tiny-llama.yaml'?"),
        ("/no/such/place.yml", "those that ship: "),
    ],
)
def test_what_does_not_exist_names_the_nearest(name: str, hint: str) -> None:
    for argv in (["--config", name], [f"--config={name}"]):
        with pytest.raises(ConfigNotFound) as error:
            resolve_configs(argv)
        assert str(error.value).startswith(f"--config: no file {name!r} here or among the shipped configurations; ")
        assert hint in str(error.value)
        if "those that ship" in hint:
            shipped = [str(x.relative_to(shipped_configs())) for x in shipped_configs().rglob("*.yaml")]
            assert all(x in str(error.value) for x in shipped)


def test_an_installed_package_carries_its_own(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = elsewhere / "site-packages" / "halos_pl" / "configs"
    configs.mkdir(parents=True)
    (configs / "own.yaml").touch()
    monkeypatch.setattr(config_files, "__file__", str(configs.parent / "config_files.py"))
    assert resolve_configs(["--config", "own.yaml"]) == ["--config", str(configs.resolve() / "own.yaml")]
