"""README.md of an exported policy: what it was made of, with what, and how it did."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from halos_pl import __version__
from halos_pl.data import AlignmentData
from halos_pl.module import AlignmentModule


def model_card(
    module: AlignmentModule, data: AlignmentData, before: Mapping[str, float], after: Mapping[str, float], *, steps: int
) -> str:
    """Markdown with the metadata that model hubs read.

    Args:
        module: the trained module.
        data: its data.
        before: held-out metrics at the start; may be empty.
        after: the same at the end.
        steps: optimizer steps taken.
    """
    objective = module.objective
    name = type(objective).__name__
    base = module.source.name
    header = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["halos-pl", name.lower()]}
    if base is not None and not Path(base).expanduser().exists():  # a name on the hub
        header["base_model"] = base
    reference = "none" if module.reference_source is None else module.reference_source.name or "random weights"
    if module.lora is not None and module.lora.adapter is not None and module.reference_source is module.source:
        reference += f" with the adapter {module.lora.adapter}"
    versions = ", ".join(f"{x} {version(x)}" for x in ("lightning", "transformers"))
    count = f"{steps} optimizer step" + "s" * (steps != 1)
    lines = [
        f"# {name}-aligned {module.source.pretrained_config.model_type} model",
        "",
        f"Trained with halos-pl {__version__} (torch {torch.__version__}, {versions}) for {count}.",
        "",
        f"- policy at the start: `{base or 'random weights'}`",
        f"- reference: `{reference}`",
        f"- objective: `{objective}`",
        *([] if module.lora is None else [f"- trained by adapters: `{module.lora}`"]),
        *(
            f"- {stage} data: `{', '.join(x.name for x in data.sources[stage])}`: {dataset.report}"
            for stage, dataset in data.datasets.items()
        ),
        "",
    ]
    if after:
        lines += ["| held-out metric | before | after |", "|---|---|---|"]
        lines += [
            f"| {x} | {before[x]:.4g} | {y:.4g} |" if x in before else f"| {x} | | {y:.4g} |" for x, y in after.items()
        ]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n" + "\n".join(lines) + "\n"
