"""Models from a folder, a hub name or a bare configuration, with clear errors before any weight is read."""

from __future__ import annotations

import copy
import difflib
import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from halos_pl.nano.shipped import locate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class ModelError(ValueError):
    """The model that the user named cannot be used; the message says why and what would do."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: pretrained weights (`name`), or random weights of a configuration (`config`).

    Args:
        name: folder in Hugging Face format, hub name, or `nano:model`.
        config: a config.json, a folder that holds one, or its content as a mapping.
        dtype: of the weights: float32, bfloat16 or float64.
        dropout: keep the dropout of the configuration; otherwise all of it is set to 0.
        attn_implementation: as in transformers; None takes its default.
        trust_remote_code: run model code that the folder or the hub brings.
        seed: of random weights.
        quantize: none, 4bit or 8bit: of pretrained weights, by bitsandbytes.
    """

    name: str | None = None
    config: str | dict[str, Any] | None = None
    dtype: str = "float32"
    dropout: bool = False
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    quantize: str = "none"

    def __post_init__(self) -> None:
        if (self.name is None) == (self.config is None):
            raise ModelError(
                "name the policy with exactly one of `--model.policy FOLDER_OR_HUB_NAME` (pretrained weights) and "
                "`--model.config CONFIG` (random weights)"
            )
        if self.dtype not in DTYPES:
            raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @cached_property
    def pretrained_config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises:
            ModelError: no such folder or file, not a model folder, or an unknown model type.
        """
        if self.name is not None:
            return _read_config(self.name, self.trust_remote_code)
        assert self.config is not None
        if isinstance(self.config, str):
            path = Path(self.config).expanduser()
            if path.suffix != ".json":
                return _read_config(self.config, self.trust_remote_code)
            values = _read_json(path)
        else:
            values = dict(self.config)
        kind = values.pop("model_type", None)
        if kind not in CONFIG_MAPPING:
            near = [] if kind is None else difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=3)
            raise ModelError(
                f"--model.config: model_type is {kind!r}, which transformers does not know"
                + (f"; nearest: {', '.join(near)}" if near else "; give one, such as llama")
            )
        if isinstance(self.config, dict):  # typed by hand
            _refuse_unknown_keys(values, CONFIG_MAPPING[kind])
        try:
            return CONFIG_MAPPING[kind](**values)
        except Exception as error:
            raise ModelError(f"--model.config: not a configuration of a {kind} model: {error}") from error

    @property
    def max_positions(self) -> int | None:
        config = self.pretrained_config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)

    @property
    def vocab_size(self) -> int:
        return int(self.pretrained_config.get_text_config().vocab_size)


def load_model(source: ModelSource) -> PreTrainedModel:
    """The model in the dtype asked for, in training mode, without dropout unless the source keeps it.

    Raises:
        ModelError: the weights are missing or do not belong to the configuration.
    """
    config, options = source.pretrained_config, _options(source)
    try:
        if source.name is None:
            with torch.random.fork_rng():
                torch.manual_seed(source.seed)
                model = AutoModelForCausalLM.from_config(config, **options)
        else:
            folder = str(Path(locate(source.name)).expanduser())
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
            model, info = loaded
            if wrong := sorted(info["mismatched_keys"]):
                name, found, expected = wrong[0]
                raise ModelError(
                    f"{source.name}: {name} is {list(found)} in the weights, but config.json asks for {list(expected)} "
                    f"({len(wrong)} such in all)"
                )
            if missing := sorted(info["missing_keys"]):
                raise ModelError(f"{source.name}: the weights lack {', '.join(missing[:5])} ({len(missing)} in all)")
    except (OSError, ValueError, ImportError, RuntimeError, UnpicklingError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{source.name or 'model.config'}: cannot be loaded as a causal language model: {error}"
        ) from error
    if not source.dropout:
        _switch_dropout_off(model)
    return model.train()


def load_skeleton(source: ModelSource) -> PreTrainedModel:
    """The same model without weights, on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.pretrained_config, **_options(source))
    if not source.dropout:
        _switch_dropout_off(model)
    return model.train()


def _options(source: ModelSource) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": DTYPES[source.dtype], "trust_remote_code": source.trust_remote_code}
    if source.attn_implementation is not None:
        options["attn_implementation"] = source.attn_implementation
    if source.quantize != "none":
        options["quantization_config"] = _quantization(source.quantize)
    return options


def _quantization(bits: str) -> BitsAndBytesConfig:
    """Of QLoRA (Dettmers et al. 2023): 4-bit NormalFloat with doubly quantized scales; or LLM.int8()."""
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def check_precision(precision: str, dtype: str, *, training: bool) -> None:
    """Which of the trainer's precisions goes with which dtype of the weights.

    Raises:
        ModelError: the trainer would cast buffers, or mix with weights that are not float32.
    """
    if precision.endswith("-true") and precision != "32-true":
        raise ModelError(
            f"--trainer.precision {precision} would also cast the model's rotary and other buffers; for weights of "
            "that type set --model.dtype bfloat16 (or float64), for mixed precision --trainer.precision bf16-mixed"
        )
    if precision.endswith("-mixed") and dtype != "float32":
        raise ModelError(f"--trainer.precision {precision} mixes with float32 weights: leave --model.dtype float32")
    if training and dtype == "bfloat16":
        warnings.warn(
            "bfloat16 weights lose updates below 1/256 of their size, most of them at the usual learning rates; "
            "--model.dtype float32 with --trainer.precision bf16-mixed does not",
            stacklevel=2,
        )


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass. transformers renamed its switch on the way to version 6."""
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": False})


def _switch_dropout_off(model: PreTrainedModel) -> None:
    """Dropout layers, and the probabilities that modules keep as floats or read from their configuration, of which all
    below the model itself get a copy: the one that is exported stays as it is."""
    copies: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_dropout(module)
        config = vars(module).get("config")
        if module is not model and isinstance(config, PretrainedConfig):
            quiet = vars(module)["config"] = copies.setdefault(id(config), copy.deepcopy(config))
            _zero_dropout(quiet)


def _zero_dropout(owner: object) -> None:
    for name, value in list(vars(owner).items()):
        if isinstance(value, float) and ("dropout" in name or name.endswith("drop")):
            setattr(owner, name, 0.0)


def _read_config(name: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        path = Path(name := locate(name)).expanduser()
    except ValueError as error:
        raise ModelError(str(error)) from error
    inside = len(path.parts) > 1 and path.parent.is_dir()
    looks_local = inside or path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        siblings = [str(x) for x in path.parent.iterdir() if x.is_dir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), siblings, n=3, cutoff=0.6)
        raise ModelError(f"no model folder {name!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
    if looks_local and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            base = _read_json(path / "adapter_config.json").get("base_model_name_or_path") or "ITS_BASE"
            raise ModelError(
                f"{name} is an adapter, not a model: --model.policy {base} --model.lora.adapter {name} goes on with it"
            )
        held = ", ".join(sorted(x.name for x in path.iterdir())[:8]) or "nothing"
        run = f"; the policy of a run: python -m halos_pl export {name}" if (path / "checkpoints").is_dir() else ""
        raise ModelError(f"{name} is not a model folder: it has no config.json (it holds {held}){run}")
    try:
        return AutoConfig.from_pretrained(str(path) if looks_local else name, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "its config.json cannot be read" if looks_local else "neither a folder here nor a model on the hub"
        raise ModelError(f"{name}: {where}: {reason}") from error


def _refuse_unknown_keys(values: dict[str, Any], config: type[PretrainedConfig]) -> None:
    """transformers keeps any key, and its default in place of a mistyped one."""
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    known = {*config().to_dict(), *config.attribute_map, *PretrainedConfig().to_dict(), *special}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ModelError(f"--model.config: {config.__name__} has no key {key!r}{hint}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"--model.config: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"--model.config: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"--model.config: {path} must hold one JSON object, got {type(values).__name__}")
    return values
