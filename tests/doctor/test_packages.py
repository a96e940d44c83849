"""What the metadata ask for, against what is installed."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from halos_pl.doctor.packages import Package, packages, requirements

ASKED = [
    "torch>=2.11",
    "lightning<2.7,>=2.6.6",
    'gone>=1; platform_system == "nowhere"',
    'peft>=0.18; extra == "lora"',
    'pytest>=8; extra == "test"',
]


@pytest.mark.parametrize(
    ("installed", "wanted", "extra", "ok"),
    [
        ("2.11.0", ">=2.11", None, True),
        ("2.13.0+cpu", ">=2.11", None, True),
        ("2.12.0rc1", ">=2.11", None, True),
        ("2.9.1", ">=2.11", None, False),
        ("2.7.0", "<2.7,>=2.6.6", None, False),
        (None, ">=1", None, False),
        (None, ">=1", "lora", True),
        ("0.17", ">=0.18", "lora", False),
        ("1.0", "", None, True),
    ],
)
def test_what_meets_what(installed: str | None, wanted: str, extra: str | None, ok: bool) -> None:
    assert Package("x", installed, wanted, extra).ok is ok


def test_what_is_asked_for_here() -> None:
    has = {"torch": "2.10", "lightning": "2.6.6", "tokenizers": "0.23"}
    found = packages(ASKED, ">=3.10", has.get)
    assert [x.name for x in found] == ["python", "halos-pl", "torch", "lightning", "tokenizers", "peft"]
    assert {x.name for x in found if not x.ok} == {"torch"}
    by_name = {x.name: x for x in found}
    assert by_name["peft"] == Package("peft", None, ">=0.18", "lora")
    assert by_name["peft"].remedy == "pip install 'halos-pl[lora]'"
    assert by_name["torch"].remedy == "pip install 'torch>=2.11'"
    assert by_name["tokenizers"].wanted == ""


def test_an_old_python() -> None:
    (python, *_) = packages([], ">=4")
    assert not python.ok
    assert python.remedy == "install Python >=4"


def test_the_installed_metadata() -> None:
    asked, python = requirements()
    found = {x.name: x for x in packages(asked, python)}
    assert found["torch"].version == version("torch")
    assert found["torch"].wanted.startswith(">=")
    assert found["python"].wanted == ">=3.10"
    assert found["peft"].extra == "lora"
    assert not {"pytest", "ruff", "mypy"} & set(found)
    assert all(x.ok for x in found.values())


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    assert requirements() == ([], "")
