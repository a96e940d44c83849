"""What the package's metadata ask for, and what of it is installed."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from halos_pl import __version__

SHOWN = (
    *("torch", "triton", "lightning", "transformers", "tokenizers", "datasets", "torchmetrics", "tensorboard"),
    *("jsonargparse", "safetensors", "peft", "matplotlib", "openai", "trl"),
)
"""In this order, before whatever else the package asks for."""


@dataclass(frozen=True)
class Package:
    """A distribution: what is installed (None: nothing), what is asked for, and which extra asks (None: the core)."""

    name: str
    version: str | None
    wanted: str
    extra: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it is installed and within what is asked for. What only an extra needs may be absent."""
        if self.version is None:
            return self.extra is not None
        return SpecifierSet(self.wanted).contains(self.version, prereleases=True)

    @property
    def remedy(self) -> str:
        what = f"{self.name}{self.wanted}" if self.extra is None else f"halos-pl[{self.extra}]"
        return f"pip install '{what}'" if self.name != "python" else f"install Python {self.wanted}"


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> tuple[list[str], str]:
    """What the package's metadata ask for, and of Python; nothing where it is not installed as a distribution."""
    try:
        found = importlib.metadata.metadata("halos-pl")
    except importlib.metadata.PackageNotFoundError:
        return [], ""
    return importlib.metadata.requires("halos-pl") or [], ",".join(found.get_all("Requires-Python") or [])


def packages(
    asked: Iterable[str], python: str, version_of: Callable[[str], str | None] = installed, skip: str = "test"
) -> list[Package]:
    """Each distribution that this one asks for on this platform, but for those of the extra `skip`."""
    found: dict[str, Package] = {}
    for line in asked:
        one = Requirement(line)
        core = one.marker is None or one.marker.evaluate({"extra": ""})
        extra = None if core else _extra(one)
        if core or extra not in (None, skip):
            found.setdefault(one.name, Package(one.name, version_of(one.name), str(one.specifier), extra))
    for name in SHOWN:
        if name not in found and (version := version_of(name)):
            found[name] = Package(name, version, "")
    order = {name: i for i, name in enumerate(SHOWN)}
    first = [Package("python", platform.python_version(), python), Package("halos-pl", __version__, "")]
    return first + sorted(found.values(), key=lambda x: (x.extra is not None, order.get(x.name, len(order)), x.name))


def _extra(one: Requirement) -> str | None:
    """The extra that asks for it on this platform."""
    assert one.marker is not None
    words = str(one.marker).replace("'", '"').split('"')[1::2]
    return next((word for word in words if one.marker.evaluate({"extra": word})), None)
