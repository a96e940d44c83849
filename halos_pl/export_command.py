"""`python -m halos_pl export RUN`: the policy of a checkpoint as a folder in Hugging Face format, in one process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from halos_pl import resume
from halos_pl.checkpoints import CheckpointError, open_checkpoint
from halos_pl.data import AlignmentData, DataError
from halos_pl.data.encoder import make_encoder
from halos_pl.handover import adapter_beside, hand_over
from halos_pl.model_card import model_card
from halos_pl.models import ModelError
from halos_pl.module import AlignmentModule
from halos_pl.quiet import quieten
from halos_pl.run_folder import RunError, find_checkpoint


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise RunError(f"config.yaml of the run cannot be read: {message}")


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(
        prog="python -m halos_pl export",
        description="Write the policy of a checkpoint, sharded or not, as `fit` does at its end: weights, tokenizer "
        "and card, adapters merged. The model that the run began with must still be where it was.",
        allow_abbrev=False,
    )
    own.add_argument("run", help="folder of the run: runs/NAME")
    own.add_argument("--ckpt_path", default="last", help="last (default), best, or the folder of a checkpoint")
    own.add_argument("--out", help="folder to write; default: policy in the run's, or policy-step=N if there is one")
    return own


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0; 2 for a mistake of the user's, told on stderr in one message.
    """
    options = parser().parse_args(argv)
    quieten()
    try:
        for name, place in export(Path(options.run), options.ckpt_path, options.out and Path(options.out)).items():
            print(f"{name:12} {place}")
    except (RunError, CheckpointError, ModelError, DataError) as error:
        print(f"halos_pl: error: {error}", file=sys.stderr)
        return 2
    return 0


def export(run: Path, ckpt_path: str = "last", out: Path | None = None) -> dict[str, str]:
    """Write the policy of a run's checkpoint.

    Args:
        run: its folder, with config.yaml.
        ckpt_path: `last`, `best`, or a checkpoint's folder.
        out: target, which must not exist. Default: `policy` in the run's folder, or `policy-step=N`.

    Returns:
        what lies where, for people.

    Raises:
        RunError: no run, no such checkpoint, or a target that is there already.
        CheckpointError: damaged.
        ModelError: the models of the configuration cannot be loaded, or the checkpoint is of others.
    """
    config = run / "config.yaml"
    if not config.is_file():
        raise RunError(f"{run} is not the folder of a run: it has no config.yaml")
    found = find_checkpoint(ckpt_path, str(run.resolve().parent), run.resolve().name)
    if found is None:
        raise RunError(f"--ckpt_path {ckpt_path}: {run} ended before its first checkpoint")
    stored = open_checkpoint(found)
    if out is None:
        taken = any(x.exists() for x in (run / "policy", adapter_beside(run / "policy")))
        out = run / f"policy-step={stored.step}" if taken else run / "policy"
    for folder in (out, adapter_beside(out)):
        if folder.exists():
            raise RunError(f"{folder} is there already: take another --out")
    module, data = made(config)
    checkpoint = stored.load()
    reference, module.reference_source = module.reference_source, None  # nothing is compared
    module.configure_model()
    module.reference_source = reference
    module.load_state_dict(resume.fitting(checkpoint["state_dict"], module), strict=False)
    data.needs = module.data_needs
    data.encoder = make_encoder(vars(data), module.data_needs)
    before = checkpoint.get("callbacks", {}).get("RunReport", {}).get("before", {})
    card = model_card(module, data, before, {}, steps=stored.step)
    out.parent.mkdir(parents=True, exist_ok=True)
    return hand_over(module, data, out.parent, card, name=out.name)


def made(config: Path) -> tuple[AlignmentModule, AlignmentData]:
    """Module and data of a run's config.yaml; nothing of them is set up."""
    own = _Parser()
    own.add_class_arguments(AlignmentModule, "model", fail_untyped=False)
    own.add_class_arguments(AlignmentData, "data", fail_untyped=False, sub_configs=False)
    try:
        settings: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
        values = own.parse_object({key: settings[key] for key in ("model", "data")})
        objects = own.instantiate(values)
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise RunError(f"{config} cannot be read: {error!r}") from error
    except ValueError as error:
        raise RunError(f"{config}: {error}") from error
    return objects.model, objects.data
