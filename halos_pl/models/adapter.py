"""An adapter's folder in peft's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halos_pl.models.export import appearing
from halos_pl.models.load import ModelError
from halos_pl.nano.shipped import locate

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINED = "default"
"""peft's name of the adapter that is trained."""

_SHAPE = {"r", "lora_alpha", "target_modules", "exclude_modules", "fan_in_fan_out", "use_rslora", "rank_pattern",
          "alpha_pattern", "layers_to_transform", "layers_pattern"}  # fmt: skip
_ASIDE = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"} | {
    *("inference_mode", "lora_dropout", "init_lora_weights", "runtime_config", "eva_config")
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that move a part of the base's weights into the adapter."""


def lora_layers(lm: PreTrainedModel) -> dict[str, Any]:
    """The model's layers that carry adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)}


def linear_layers(lm: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that can carry one, by name: all linear ones but the head. GPT-2's are called Conv1D."""
    head = lm.get_output_embeddings()
    found = {name: module for name, module in lm.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return {name: module for name, module in found.items() if module is not head}


def refuse_ends(name: str, module: nn.Module | None, lm: PreTrainedModel) -> None:
    """
    Raises:
        ModelError: the module is the output head or the table of embeddings.
    """
    if module is not None and module is lm.get_output_embeddings():
        raise ModelError(
            f"no adapter on the output head {name!r}: log-probabilities are computed from its plain weight, without "
            "logits, so that an adapter there would be left out silently; leave it out of the target modules"
        )
    if module is not None and module is lm.get_input_embeddings():
        raise ModelError(
            f"no adapter on the embeddings {name!r}: they are a table, not a linear layer, and in many models the "
            "head's weight too; leave them out of the target modules"
        )


def read_config(folder: str, base: str | None) -> Any:
    """peft's LoraConfig of an adapter.

    Args:
        folder: the adapter's.
        base: the policy that it is to be put on; None for random weights.

    Raises:
        ModelError: no adapter, one that can only be unpickled, one that asks for what is not honoured here, or one that
            was made for another base.
    """
    from peft import LoraConfig

    path = Path(folder).expanduser()
    if not (path / CONFIG).is_file():
        raise ModelError(f"--model.lora.adapter: {folder} is not an adapter's folder: it has no {CONFIG}")
    if not (path / WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        why = (
            "only adapter_model.bin, a pickle, which can run code: save it as safetensors" if pickled else "no weights"
        )
        raise ModelError(f"--model.lora.adapter: {folder} has {why} ({WEIGHTS})")
    try:
        stored = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = str(stored.get("peft_type"))
        if kind != "LORA":
            raise ModelError(f"--model.lora.adapter: {folder} is a {kind} adapter, and only LORA is known here")
        config = LoraConfig.from_pretrained(str(path))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"--model.lora.adapter: {folder}: its {CONFIG} cannot be read: {error}") from error
    plain = LoraConfig()
    asked = {field.name: getattr(config, field.name) for field in dataclasses.fields(LoraConfig)}
    for name, value in asked.items():
        if name not in _SHAPE | _ASIDE and value and value != getattr(plain, name):
            raise ModelError(f"--model.lora.adapter: {folder} was made with {name}={value!r}, not honoured here")
    if str(stored.get("init_lora_weights")).startswith(_CHANGES_BASE):
        raise ModelError(
            f"--model.lora.adapter: {folder} began as {stored['init_lora_weights']}, which changes the base's weights: "
            "convert it to plain LoRA (peft: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if not _same_base(config.base_model_name_or_path, base):
        raise ModelError(
            f"the adapter {folder} was made for the base {config.base_model_name_or_path!r}, and the policy is "
            f"{base!r}: name that base with --model.policy (or, if it is the same model under another name, write the "
            f"name in base_model_name_or_path of its {CONFIG})"
        )
    return config


def _same_base(recorded: str | None, base: str | None) -> bool:
    """One folder, or one last part of a name where the folder has moved or one of the two is of the hub."""
    if not recorded or base is None or recorded == base:
        return True
    ours, theirs = Path(locate(base)).expanduser(), Path(recorded).expanduser()
    if ours.is_dir() and theirs.is_dir():
        return ours.resolve() == theirs.resolve()
    return ours.resolve().name == theirs.name


def read_weights(folder: str, lm: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """An adapter's weights by layer: A [r, inputs] and B [outputs, r].

    Args:
        folder: the adapter's.
        lm: the model that it is to be put on, without adapters yet.

    Raises:
        ModelError: it adapts layers that this model does not have, or of other shapes, or its head or embeddings.
    """
    try:
        stored = load_file(Path(folder).expanduser() / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"--model.lora.adapter: {folder}: its {WEIGHTS} cannot be read: {error}") from error
    modules, linear = dict(lm.named_modules()), linear_layers(lm)
    found: dict[str, dict[str, Tensor]] = {}
    wrong: list[str] = []
    for key, weight in stored.items():
        parts = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(\.weight)?", key)
        name = parts[1] if parts else key
        refuse_ends(name, modules.get(name), lm)
        if parts is None or name not in linear:
            wrong.append(f"there is no linear layer {name}")
            continue
        inputs, outputs = _features(linear[name])
        own, given = (inputs, weight.shape[1]) if parts[3] == "A" else (outputs, weight.shape[0])
        if own != given:
            side = "inputs" if parts[3] == "A" else "outputs"
            wrong.append(f"{name} has {own} {side}, the adapter {given}")
        found.setdefault(name, {})[parts[3]] = weight
    wrong += [f"the adapter lacks a part of {name}" for name, both in found.items() if len(both) < 2]
    if wrong:
        raise ModelError(
            f"the adapter {folder} is for another base than this {type(lm).__name__} of {lm.name_or_path!r}: {wrong[0]}"
            + (f" ({len(wrong)} such in all)" if len(wrong) > 1 else "")
        )
    return found


def _features(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs; a quantized weight does not show them in its shape."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def export_adapter(
    lm: PreTrainedModel, folder: Path, base: str | None, *, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the trained adapter as `peft.PeftModel.from_pretrained(base, folder)` loads it. The folder appears whole or
    not at all.

    Args:
        lm: an adapted model.
        folder: target; an older export of the same run is replaced.
        base: folder or hub name of the model below the adapter; None for random weights.
        state: whole weights by name, where those of `lm` are sharded.
    """
    held: Mapping[str, Tensor] = lm.state_dict() if state is None else state
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": held[f"{name}.lora_{part}.{TRAINED}.weight"]
        for name in lora_layers(lm)
        for part in "AB"
    }
    config = copy.deepcopy(lm.peft_config[TRAINED])
    if base is not None:
        path = Path(locate(base)).expanduser()
        config.base_model_name_or_path = str(path.resolve()) if path.is_dir() else base
    config.inference_mode = True
    with appearing(folder) as aside, torch.no_grad():
        config.save_pretrained(str(aside))
        save_file({key: x.cpu().contiguous() for key, x in tensors.items()}, aside / WEIGHTS, {"format": "pt"})
