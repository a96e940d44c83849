"""`python -m halos_pl estimate`: what a training would take of each GPU, from the words of its `fit` command.

It takes every option and configuration of `fit`'s, reads those that memory, communication and time depend on, and loads
no weights and no data.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch.trainer.trainer import Trainer
from rich.console import Console

from halos_pl import losses
from halos_pl.config_files import ConfigNotFound, resolve_configs
from halos_pl.data import AlignmentData
from halos_pl.estimate.plan import REFERENCES, Lora, Plan, PlanError, Reference, Strategy
from halos_pl.estimate.report import GIB, report
from halos_pl.estimate.shapes import read_shapes
from halos_pl.estimate.speed import Machine
from halos_pl.estimate.text import show
from halos_pl.evaluate import Evaluation
from halos_pl.losses import KTO, Objective
from halos_pl.models import ModelError, ModelSource
from halos_pl.module import AlignmentModule
from halos_pl.needs import reference_source
from halos_pl.objective_choice import own_defaults
from halos_pl.parser_errors import Parser, UsageError, explain
from halos_pl.quiet import quieten

STATES = {"AdamW": 2, "Adam": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "RMSprop": 1, "Adagrad": 1, "SGD": 0, "Muon": 1}
"""Float32 numbers that an optimizer keeps of each parameter; SGD with momentum one. Others are taken for two."""
_CLASSES = {"model.objective": {x.__name__: x for x in losses.OBJECTIVES}}


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0; 1 where the step does not fit into the memory; 2 for a mistake of the user's, told on stderr in one message.
    """
    try:
        return estimate(argv)
    except (UsageError, ConfigNotFound, PlanError, ModelError) as error:
        print(f"halos_pl: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the report has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def estimate(argv: list[str]) -> int:
    """Print a report.

    Raises:
        UsageError, PlanError: of options and configurations.
        ModelError: of models that cannot be used.
    """
    quieten()
    options = parse(argv)
    model, objective = options.model, _objective(options.model.objective)
    source = ModelSource(model.policy, model.config, model.dtype, trust_remote_code=model.trust_remote_code)
    plan = _plan(options, objective, source)
    machine = Machine(
        options.flops * 1e12,
        options.mfu,
        options.bandwidth,
        options.network,
        options.gpus_per_node,
        options.latency,
        options.host_bandwidth,
    )
    rows = 2 if objective.view == "paired" else 1
    found = report(read_shapes(source), plan, machine, limit=options.memory * GIB * (1 - options.reserve), rows=rows)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, Console(highlight=False))
    return 0 if found["fits"] else 1


def parse(argv: list[str]) -> Any:
    """The options.

    Raises:
        UsageError: what is wrong, and the nearest thing that is not.
        ConfigNotFound: no such configuration.
    """
    own = parser()
    argv = argv[1:] if argv[:1] == ["fit"] else argv
    try:
        return own.parse_args(own_defaults(resolve_configs(argv)))
    except UsageError as error:
        raise UsageError(explain(str(error), own, _CLASSES)) from None


def parser() -> ArgumentParser:
    own = Parser(
        prog="python -m halos_pl estimate",
        description="Memory of a GPU, communication and time of a training step, by formulas: no weights are loaded. "
        "Takes the options of fit, and these. The exit status is 1 where the step does not fit, 2 for mistakes.",
        allow_abbrev=False,
    )
    add = own.add_argument
    add("--config", "-c", action="config", help="A configuration of fit's, or one that ships.")
    add("--gpus", type=PositiveInt | None, default=None, help="All of them. Default: trainer.devices x num_nodes.")
    add(
        "--shard",
        type=PositiveInt | None,
        default=None,
        help="GPUs that share a copy (FSDP; fewer: HSDP). Default: all.",
    )
    add("--memory", type=PositiveFloat, default=80.0, help="Of a GPU, GiB.")
    add("--reserve", type=float, default=0.1, help="Share of it for the context, NCCL and fragmentation.")
    add("--reference", type=Reference | None, default=None, help="; ".join(f"{k}: {v}" for k, v in REFERENCES.items()))
    add("--offload_reference", type=bool, default=False, help="Short for --reference offloaded.")
    add("--reference_dtype", type=str, default="float32", choices=("float32", "bfloat16"), help="In which it is kept.")
    add("--scored", type=PositiveFloat, default=0.5, help="Share of the tokens that belong to completions.")
    add("--flops", type=PositiveFloat, default=989.0, help="Dense TFLOP/s of a GPU: an H100's in bf16.")
    add("--mfu", type=PositiveFloat, default=0.4, help="Share of them that is reached.")
    add("--bandwidth", type=PositiveFloat, default=360.0, help="GB/s that a GPU sends to others of its node.")
    add("--network", type=PositiveFloat, default=45.0, help="GB/s that a GPU sends to other nodes.")
    add("--gpus_per_node", type=PositiveInt, default=8, help="Of a node.")
    add("--latency", type=float, default=5.0, help="µs of each step of a ring.")
    add("--host_bandwidth", type=PositiveFloat, default=25.0, help="GB/s from host memory to a GPU.")
    add("--json", action="store_true", help="Print one JSON object instead.")
    own.add_class_arguments(AlignmentModule, "model", fail_untyped=False)
    if not any("model.lora" in x for action in own._actions for x in action.option_strings):
        add("--model.lora.r", type=NonNegativeInt, default=0, help="Rank of LoRA adapters; 0: all weights are trained.")
        add(
            "--model.lora.target_modules",
            type=list[str] | None,
            default=None,
            help="Linear layers that get one. Default: all.",
        )
    own.add_class_arguments(AlignmentData, "data", fail_untyped=False)
    own.add_class_arguments(Trainer, "trainer", fail_untyped=False)
    own.add_class_arguments(Evaluation, "evaluation", fail_untyped=False)
    for name in ("--name", "--runs", "--ckpt_path", "--seed_everything"):
        add(name, type=str | int | None, default=None, help="As of fit; of no account here.")
    return own


def _plan(options: Any, objective: Objective, source: ModelSource) -> Plan:
    """The plan that the words of `fit` mean."""
    trainer, model, data = options.trainer, options.model, options.data
    gpus = options.gpus or _count(trainer.devices) * int(trainer.num_nodes)
    strategy = _strategy(trainer.strategy, gpus)
    positions = source.max_positions
    if data.max_length < 1 or data.batch_size < 1:
        raise PlanError("--data.batch_size and --data.max_length must be at least 1")
    if source.dtype == "float64":
        raise PlanError("--model.dtype float64 is for tests on the CPU: give float32 or bfloat16")
    if trainer.precision not in (None, "bf16-mixed", "32-true", "32", 32):
        raise PlanError(f"--trainer.precision {trainer.precision} is not estimated: bf16-mixed or 32-true")
    if not 0 <= options.reserve < 1:
        raise PlanError(f"--reserve is a share in [0, 1), got {options.reserve}")
    mixed, lora = trainer.precision in (None, "bf16-mixed"), _lora(model)
    stored = source.dtype == "bfloat16"
    return Plan(
        rows=data.batch_size * (2 if objective.view == "paired" else 1),
        length=min(data.max_length, positions or data.max_length),  # as `fit` cuts it
        gpus=gpus,
        shard=options.shard or (gpus if strategy == "fsdp" else 1),
        strategy=strategy,
        scored=options.scored,
        accumulate=int(trainer.accumulate_grad_batches),
        compute="bfloat16" if stored or (mixed and strategy == "fsdp") else "autocast" if mixed else "float32",
        weight_bytes=2 if stored else 4,
        reference=_reference(options, objective, source, lora),
        reference_bytes=2 if stored or options.reference_dtype == "bfloat16" else 4,
        mismatched=objective.reference_point_from == "mismatched",
        checkpointing=model.gradient_checkpointing,
        lora=lora,
        optimizer_states=_states(model.optimizer),
    )


def _reference(options: Any, objective: Objective, source: ModelSource, lora: Lora | None) -> Reference:
    name = options.model.reference
    try:
        needed = reference_source(objective, source, name) is not None
    except ValueError as error:
        raise UsageError(str(error)) from error
    chosen: Reference | None = options.reference
    if options.offload_reference and chosen not in (None, "offloaded"):
        raise PlanError(f"--offload_reference and --reference {chosen}: one or the other")
    if not needed:
        if chosen not in (None, "none") or options.offload_reference:
            raise PlanError(f"{type(objective).__name__} loads no reference here: leave --reference out")
        return "none"
    if chosen == "none":
        raise PlanError(f"--reference none: say so as fit does, --model.reference none (got {name!r})")
    if options.offload_reference:
        return "offloaded"
    return chosen or ("adapter" if lora is not None and name == "copy" else "resident")


def _lora(model: Any) -> Lora | None:
    """The adapters that the module's options ask for; a rank that they leave open is 16."""
    own = model.get("lora")
    if own is None:
        return None
    values = dict(own.as_dict() if hasattr(own, "as_dict") else own)
    values.update(values.get("init_args") or {})
    if values.get("quantize", "none") != "none":
        raise PlanError(f"--model.lora.quantize {values['quantize']} is not estimated")
    if values.get("r", 16) == 0:
        return None
    targets = values.get("target_modules")
    return Lora(values.get("r") or 16, None if targets is None else tuple(targets))


def _objective(spec: Any) -> Objective:
    if isinstance(spec, Objective):
        return spec
    if spec is None:
        return KTO()
    module, _, name = spec["class_path"].rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)(**dict(spec.get("init_args", {})))
    except ValueError as error:
        raise UsageError(f"--model.objective: {error}") from error
    assert isinstance(made, Objective)
    return made


def _states(spec: Any) -> int:
    if not hasattr(spec, "class_path"):  # the default
        return STATES["AdamW"]
    name, given = spec.class_path.rpartition(".")[2], dict(spec.get("init_args", {}))
    more = (name == "RMSprop" and bool(given.get("centered"))) + bool(
        name in ("SGD", "RMSprop") and given.get("momentum")
    )
    return STATES.get(name, 2) + more


def _count(devices: Any) -> int:
    if isinstance(devices, list):
        return len(devices)
    words = str(devices).split(",")
    return int(words[0]) if len(words) == 1 and words[0].isdecimal() and int(words[0]) else max(1, len(words))


def _strategy(given: Any, gpus: int) -> Strategy:
    name = str(given if isinstance(given, str) else given.get("class_path", "")).lower()
    if "fsdp" in name:
        return "fsdp"
    if "ddp" in name:
        return "ddp" if gpus > 1 else "single"
    if name == "auto":
        return "fsdp" if gpus > 1 else "single"
    raise PlanError(f"--trainer.strategy {name} is not estimated: fsdp or ddp")
