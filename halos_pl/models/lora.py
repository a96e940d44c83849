"""Low-rank adapters beside frozen weights (LoRA, Hu et al. 2021; beside quantized ones QLoRA, Dettmers et al. 2023)."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halos_pl.models.adapter import (
    TRAINED,
    linear_layers,
    lora_layers,
    read_config,
    read_weights,
    refuse_ends,
)
from halos_pl.models.load import ModelError, ModelSource

START = "start"
"""The frozen copy of the adapter that the training began with."""


@dataclass(frozen=True)
class LoRA:
    """Train adapters alone: a layer's output Wx becomes Wx + (alpha / r) B A x, with B = 0 at the start.

    Args:
        r: Rank of the adapters. Default: 16.
        alpha: Their scale is alpha / r. Default: 2 r.
        dropout: Of the adapters' inputs, in training. Off: policy == reference gives log-ratios of exactly 0.
        target_modules: Names of linear layers (or ends of their names), such as [q_proj, v_proj]. Default: all but the
            output head.
        rslora: Scale by alpha / sqrt(r) (Kalajdzievski 2023).
        adapter: Folder of an adapter in peft's format to go on with. It brings its own rank, scale and targets, and
            the reference is the model with it as it was.
        quantize: Keep the frozen weights in 4 bits (NF4, computing in bfloat16) or 8: on CUDA, with bitsandbytes.
    """

    r: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | None = None
    rslora: bool = False
    adapter: str | None = None
    quantize: Literal["none", "4bit", "8bit"] = "none"

    def __post_init__(self) -> None:
        if self.r is not None and self.r < 1:
            raise ValueError(f"lora.r must be at least 1, got {self.r}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora.alpha must be positive, got {self.alpha:g}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout:g}")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("lora.target_modules names no layer; left out, it takes all linear ones but the head")
        if self.quantize not in ("none", "4bit", "8bit"):
            raise ValueError(f"lora.quantize takes none, 4bit, 8bit, got {self.quantize!r}")
        own = ("r", "alpha", "target_modules", "rslora")
        if self.adapter is not None and (given := [name for name in own if getattr(self, name)]):
            raise ValueError(f"lora.adapter brings its own {given[0]}: leave --model.lora.{given[0]} out")

    def __str__(self) -> str:
        """What it comes to: rank and scale with their defaults, of the rest what is not the default."""
        told = {"r": self.rank, "alpha": self.scale} if self.adapter is None else {}
        told |= {x.name: getattr(self, x.name) for x in fields(self) if x.name not in ("r", "alpha")}
        plain = {x.name: x.default for x in fields(self)}
        return f"LoRA({', '.join(f'{name}={value!r}' for name, value in told.items() if value != plain[name])})"

    @property
    def rank(self) -> int:
        return self.r or 16

    @property
    def scale(self) -> float:
        """Alpha, which is divided by the rank."""
        return self.alpha or 2 * self.rank

    def check(self, source: ModelSource) -> None:
        """What can be known before any weight is read.

        Raises:
            ModelError: something is not installed, bitsandbytes finds no CUDA, or the adapter is of another base.
        """
        if find_spec("peft") is None:
            raise ModelError("--model.lora needs peft: pip install 'halos-pl[lora]'")
        if self.quantize != "none":
            if source.config is not None:
                raise ModelError("--model.lora.quantize quantizes pretrained weights: name them with --model.policy")
            if not torch.cuda.is_available():
                raise ModelError(f"--model.lora.quantize {self.quantize} needs a CUDA device, and there is none here")
            if find_spec("bitsandbytes") is None:
                raise ModelError(f"--model.lora.quantize {self.quantize} needs bitsandbytes: pip install bitsandbytes")
        if self.adapter is not None:
            read_config(self.adapter, source.name)


def adapt(lm: PreTrainedModel, lora: LoRA, source: ModelSource, *, keep_start: bool = False) -> None:
    """Freeze the model and put adapters on it, in place. They are float32 beside 16-bit weights, so that no update is
    lost; the model computes the same as before to the last bit (with `lora.adapter`: as with that adapter).

    Args:
        lm: as loaded; its module names stay, except that a layer's own weights move to `NAME.base_layer`.
        lora: which adapters.
        source: where the model comes from; its seed is that of A.
        keep_start: keep a frozen copy START of the adapter that it goes on with.

    Raises:
        ModelError: a target is not a linear layer of this model, or the adapter does not fit it.
    """
    if lora.adapter is None:
        config, weights = _fresh(lm, lora), None
    else:
        config, weights = read_config(lora.adapter, source.name), read_weights(lora.adapter, lm)
        config.lora_dropout, config.init_lora_weights, config.inference_mode = lora.dropout, True, False
    _inject(lm, config, TRAINED, source.seed)
    layers = lora_layers(lm)
    if weights is not None:
        if differing := set(layers) ^ set(weights):
            raise ModelError(f"the adapter {lora.adapter}: weights and configuration differ on {sorted(differing)[0]}")
        if keep_start:
            _inject(lm, copy.deepcopy(config), START, source.seed)
    for name, layer in layers.items():
        for adapter, trained in ((TRAINED, True), (START, False)):
            for part, held in (("A", layer.lora_A), ("B", layer.lora_B)):
                if adapter not in held:
                    continue
                weight = held[adapter].weight
                weight.data = weight.data.to(torch.promote_types(lm.dtype, torch.float32)).contiguous()
                if weights is not None:
                    _copy(weights[name][part], weight, f"{lora.adapter}: {name}.lora_{part}")
                weight.requires_grad_(trained)
        layer._active_adapter = [TRAINED]


def _fresh(lm: PreTrainedModel, lora: LoRA) -> Any:
    from peft import LoraConfig

    targets = _targets(lm, lora.target_modules)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale,  # type: ignore[arg-type]  # a float does as well
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        fan_in_fan_out=all(isinstance(x, Conv1D) for n, x in linear_layers(lm).items() if _ends(n, targets)),
        task_type="CAUSAL_LM",
    )


def _inject(lm: PreTrainedModel, config: Any, name: str, seed: int) -> None:
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # peft finds out by itself
        warnings.filterwarnings("ignore", message=".*multiple adapters.*")
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, lm, name)
        except ValueError as error:
            raise ModelError(f"--model.lora: {type(lm).__name__} cannot carry these adapters: {error}") from error


def _targets(lm: PreTrainedModel, wanted: Sequence[str] | None) -> list[str]:
    """Names that peft finds exactly the wanted layers by; short ones, as other programs know them, where they do."""
    linear, modules = linear_layers(lm), dict(lm.named_modules())
    for target in wanted or ():
        if any(_ends(name, [target]) for name in linear):
            continue
        for name, module in modules.items():
            if _ends(name, [target]):
                refuse_ends(name, module, lm)
        short = sorted({name.rsplit(".", 1)[-1] for name in linear})
        near = difflib.get_close_matches(target, short, n=1)
        raise ModelError(
            f"--model.lora.target_modules: {type(lm).__name__} has no linear layer {target!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f"; it has {', '.join(short)}"
        )
    whole = {name for name in linear if wanted is None or _ends(name, wanted)}
    short = sorted({name.rsplit(".", 1)[-1] for name in whole} if wanted is None else set(wanted))
    return short if {name for name in modules if _ends(name, short)} == whole else sorted(whole)


def _ends(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _copy(source: Tensor, target: Tensor, what: str) -> None:
    if source.shape != target.shape:
        raise ModelError(f"{what} is {list(source.shape)}, but its configuration asks for {list(target.shape)}")
    with torch.no_grad():
        target.copy_(source)


@contextmanager
def acting(lm: PreTrainedModel, adapter: str | None) -> Iterator[None]:
    """Within, the adapter of that name acts, or none, in place of the one that is trained.

    peft's own switches also turn `requires_grad` of the adapters off and on, behind the back of whoever shards them.
    """
    layers = list(lora_layers(lm).values())
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            off, active = adapter is None, [adapter or TRAINED]
            layer._disable_adapters, layer._active_adapter = off, active
            if layer.disable_adapters != off or layer.active_adapters != active or active[0] not in layer.lora_A:
                raise RuntimeError("this version of peft switches adapters in a way that is not known here")
        yield
    finally:
        for layer, switches in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = switches


@torch.no_grad()
def merged(lm: PreTrainedModel, state: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """A model without adapters that computes the same: W + (alpha / r) B A. The adapted one is left as it is, and
    shares with it all weights that no adapter changes.

    Args:
        lm: an adapted model.
        state: whole weights by name, where those of `lm` are sharded.

    Raises:
        ModelError: its weights are quantized: merged ones would be rounded again.
    """
    if getattr(lm, "quantization_method", None) is not None:
        raise ModelError("adapters are not merged into quantized weights: load the base in 16 bits for that")
    plain_state = dict(lm.state_dict() if state is None else state)
    for name, layer in lora_layers(lm).items():
        a, b = (plain_state[f"{name}.lora_{part}.{TRAINED}.weight"] for part in "AB")
        weight = plain_state[f"{name}.base_layer.weight"]
        wide = torch.promote_types(weight.dtype, a.dtype)
        change = layer.scaling[TRAINED] * (b.to(wide) @ a.to(wide))
        change = change.T if isinstance(layer.get_base_layer(), Conv1D) else change
        plain_state[f"{name}.base_layer.weight"] = (
            (weight.to(wide) + change).to(weight.dtype).cpu()
        )  # beside a training
        for key in [key for key in plain_state if key.startswith(f"{name}.")]:
            value = plain_state.pop(key)
            if key.startswith(f"{name}.base_layer."):
                plain_state[key.replace(f"{name}.base_layer.", f"{name}.")] = value
    with torch.device("meta"):
        plain = type(lm)(copy.deepcopy(lm.config))
    plain.load_state_dict(plain_state, assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(lm.generation_config)
    return plain.train(lm.training)
