"""Who may import whom. The table is the architecture; an arrow that it does not draw is a defect."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# torch and the standard library are free everywhere.
LAYERS: dict[str, set[str]] = {
    "halos_kernels": {"triton"},
    "halos_pl": set(),
    "halos_pl.batch": set(),
    "halos_pl.value": set(),
    "halos_pl.accumulation": {"halos_pl.parallel"},
    "halos_pl.parallel": set(),
    "halos_pl.ranks": set(),
    "halos_pl.signals": set(),
    "halos_pl.watchdog": set(),
    "halos_pl.memory": {"halos_pl.batch"},
    "halos_pl.checkpoints": {"halos_pl", "halos_pl.parallel", "halos_pl.ranks", "lightning", "safetensors"},
    "halos_pl.fsdp": {"halos_pl.checkpoints", "halos_pl.parallel", "lightning"},
    "halos_pl.handover": {"halos_pl.data", "halos_pl.models", "halos_pl.module", "halos_pl.parallel"},
    "halos_pl.stepping": {
        *("halos_pl", "halos_pl.accumulation", "halos_pl.metrics", "halos_pl.models", "halos_pl.parallel"),
        *("halos_pl.resume", "halos_pl.schedule", "lightning"),
    },
    "halos_pl.losses": {"halos_pl.batch", "halos_pl.value"},
    "halos_pl.halo": {"halos_pl.batch", "halos_pl.losses", "halos_pl.value"},
    "halos_pl.data": {
        *("halos_pl.batch", "halos_pl.feedback_log", "halos_pl.nano"),
        *("datasets", "filelock", "lightning", "numpy", "pyarrow", "rich", "tokenizers", "transformers"),
    },
    "halos_pl.feedback_log": set(),
    "halos_pl.nano": set(),
    "halos_pl.nano.__main__": {
        *("halos_pl.data", "halos_pl.evaluate", "halos_pl.models", "halos_pl.nano"),
        *("tokenizers", "transformers"),
    },
    "halos_pl.models": {"halos_pl.nano", "transformers", "peft", "safetensors"},
    "halos_pl.scoring": {
        *("halos_pl.batch", "halos_pl.models", "halos_pl.parallel", "halos_kernels", "transformers"),
    },
    "halos_pl.metrics": {"halos_pl.batch", "torchmetrics"},
    "halos_pl.module": {
        *("halos_pl.batch", "halos_pl.fsdp", "halos_pl.losses", "halos_pl.metrics", "halos_pl.models"),
        *("halos_pl.needs", "halos_pl.ranks", "halos_pl.resume", "halos_pl.schedule", "halos_pl.scoring"),
        *("halos_pl.stepping", "halos_kernels", "lightning"),
    },
    "halos_pl.objective_choice": {"halos_pl.losses", "yaml"},
    "halos_pl.objectives": {"halos_pl", "halos_pl.halo", "halos_pl.losses"},
    "halos_pl.needs": {"halos_pl.batch", "halos_pl.losses", "halos_pl.models"},
    "halos_pl.schedule": {"halos_pl.models", "transformers"},
    "halos_pl.resume": {"halos_pl.models", "lightning"},
    "halos_pl.run_folder": {"lightning"},
    "halos_pl.curves": {"lightning"},
    "halos_pl.run_parts": {"halos_pl.checkpoints", "halos_pl.curves", "lightning", "yaml"},
    "halos_pl.run_record": {"halos_pl", "lightning"},
    "halos_pl.preemption": {"halos_pl.ranks", "halos_pl.signals", "lightning"},
    "halos_pl.guards": {
        *("halos_pl.batch", "halos_pl.memory", "halos_pl.module", "halos_pl.ranks", "halos_pl.signals"),
        *("halos_pl.watchdog", "lightning"),
    },
    "halos_pl.model_card": {"halos_pl", "halos_pl.data", "halos_pl.module", "yaml"},
    "halos_pl.evaluate": {
        *("halos_pl.batch", "halos_pl.data", "halos_pl.models", "halos_pl.module"),
        *("lightning", "numpy", "rich", "transformers"),
    },
    "halos_pl.callbacks": {
        *(
            "halos_pl.data",
            "halos_pl.evaluate",
            "halos_pl.model_card",
            "halos_pl.models",
            "halos_pl.module",
            "halos_pl.handover",
            "halos_pl.scoring",
        ),
        *("lightning", "numpy", "rich"),
    },
    "halos_pl.config_files": set(),
    "halos_pl.parser_errors": {"jsonargparse"},
    "halos_pl.quiet": {"transformers"},
    "halos_pl.cli": {"*"},
    "halos_pl.chat": {
        "halos_pl.data",
        "halos_pl.evaluate",
        "halos_pl.models",
        "halos_pl.nano",
        "numpy",
        "transformers",
    },
    "halos_pl.inspect": {
        *("halos_pl.batch", "halos_pl.config_files", "halos_pl.data", "halos_pl.losses", "halos_pl.models"),
        *("halos_pl.needs", "halos_pl.objective_choice", "halos_pl.parser_errors", "halos_pl.quiet"),
        *("jsonargparse", "numpy", "pyarrow", "rich", "transformers", "yaml"),
    },
    "halos_pl.estimate": {
        *("halos_pl.config_files", "halos_pl.data", "halos_pl.evaluate", "halos_pl.losses", "halos_pl.models"),
        *("halos_pl.module", "halos_pl.needs", "halos_pl.objective_choice", "halos_pl.parser_errors", "halos_pl.quiet"),
        *("halos_kernels", "jsonargparse", "lightning", "rich", "transformers"),
    },
    "halos_pl.export_command": {
        *("halos_pl", "halos_pl.checkpoints", "halos_pl.data", "halos_pl.handover", "halos_pl.model_card"),
        *("halos_pl.models", "halos_pl.module", "halos_pl.quiet", "halos_pl.resume", "halos_pl.run_folder"),
        *("jsonargparse", "yaml"),
    },
    "halos_pl.plots": {"halos_pl.value", "matplotlib"},
    "halos_pl.doctor": {"halos_pl", "halos_kernels", "packaging", "rich", "triton"},
    "halos_pl.__main__": {
        "halos_pl",
        "halos_pl.chat",
        "halos_pl.cli",
        "halos_pl.doctor",
        "halos_pl.estimate",
        "halos_pl.export_command",
        "halos_pl.inspect",
        "halos_pl.objectives",
        "halos_pl.plots",
    },
}
STANDARD = {"torch", "__future__"} | set(__import__("sys").stdlib_module_names)
FILES = sorted([*ROOT.glob("halos_pl/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def layer_of(module: str) -> str:
    """The longest layer that a module of ours lies in; a foreign module's top-level name."""
    parts = module.split(".")
    if parts[0] not in ("halos_pl", "halos_kernels"):
        return parts[0]
    names = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    return next(name for name in names if name in LAYERS)


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT)
    parts = relative.with_suffix("").parts[1 if relative.parts[0] == "kernels" else 0 :]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            own = node.module.split(".")[0] in ("halos_pl", "halos_kernels")
            found |= {f"{node.module}.{alias.name}" if own else node.module for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_follow_the_table(path: Path) -> None:
    me = layer_of(module_name(path))
    allowed = LAYERS[me] | {me} | STANDARD
    if "*" in allowed:
        return
    wrong = {name for name in map(layer_of, imports(path)) if name not in allowed}
    assert not wrong, f"{me} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_imports_the_cli(path: Path) -> None:
    if module_name(path) != "halos_pl.__main__":
        assert "halos_pl.cli" not in map(layer_of, imports(path))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300, "more than one concept in a file?"
    longest = 150 if "kernels" in path.parts else 60
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= longest, f"{node.name} has {lines} lines"


def test_no_file_is_called_utils() -> None:
    assert not [path for path in FILES if path.stem == "utils"]


def test_kernels_is_a_bare_folder() -> None:
    """transformers imports a top-level package called `kernels` as if it were Hugging Face's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
