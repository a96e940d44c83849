"""A model in shards (FSDP2): which of its parts are gathered one at a time, and tensors whole again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from halos_pl.parallel.tensors import local_rows


@dataclass(frozen=True)
class Plan:
    """How the models of a run are sharded.

    Args:
        mesh: one dimension `shard`, or two, `replicate` and `shard` (HSDP).
        device: of this rank.
        mixed_precision: compute and gather in bfloat16, reduce gradients in float32.
    """

    mesh: DeviceMesh
    device: torch.device
    mixed_precision: bool = False

    def shard(self, root: nn.Module, *, offload: bool = False, methods: Iterable[str] = ()) -> None:
        """Shard a model, every layer by itself and the rest as the root.

        All of it is given back after every forward, the root too: otherwise a pass without gradients between backward
        and optimizer step would leave stale weights in the root for the next forward, and a frozen root would stay
        whole for ever.

        Args:
            root: whose forward is the only way in.
            offload: keep the shards in the host's memory.
            methods: of the root that are ways in, too.
        """
        policy: dict[str, Any] = {"mesh": self.mesh, "reshard_after_forward": True}
        if self.mixed_precision:
            policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if offload:
            policy["offload_policy"] = CPUOffloadPolicy()
        several = dist.get_world_size() > 1
        full = None
        if several and dist.get_rank() == 0:  # detached: sharding takes the module's own to the device
            full = {name: x.detach() for name, x in (*root.named_parameters(), *root.named_buffers())}
        for layer in _apart(decoder_layers(root), root):
            fully_shard(layer, **policy)
        fully_shard(root, **policy)
        for method in methods:
            register_fsdp_forward_method(root, method)
        if several:
            _fill(root, full, self.device, torch.device("cpu") if offload else self.device)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a decoder: the members of the outermost lists of modules, in whatever family of models.

    Experts of a mixture, which stand in a list inside a layer, belong to their layer. A list whose members have no
    weights, or no parts (bare projections), is none.
    """
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            members = list(child) if isinstance(child, nn.ModuleList) else []
            layers = [x for x in members if any(True for _ in x.children()) and next(x.parameters(), None) is not None]
            if layers:
                found.extend(layers)
            else:
                look(child)

    look(model)
    return found


def _apart(layers: list[nn.Module], root: nn.Module) -> list[nn.Module]:
    """Those that share no weight with another layer or with the rest (Zamba's do): a weight belongs to one unit."""
    owners: dict[int, set[int]] = {}
    inside = {id(module): k for k, layer in enumerate(layers) for module in layer.modules()}
    for module in root.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), set()).add(inside.get(id(module), -1))
    for k, layer in enumerate(layers):  # a module that stands in several of them
        for p in layer.parameters():
            owners[id(p)].add(k)
    return [layer for layer in layers if all(len(owners[id(p)]) == 1 for p in layer.parameters())]


Layout = dict[str, tuple[str, torch.Size, torch.dtype]]
"""Of each weight and buffer by name: the first name of the same tensor, shape and dtype."""


def layout(model: nn.Module) -> Layout:
    """What the tensors of a model are, and which are tied."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {id(x): name for name, x in reversed(named)}
    return {name: (first[id(x)], x.shape, x.dtype) for name, x in named}


def adopt(skeleton: nn.Module, wanted: Layout) -> None:
    """Give a model on the meta device another one's tensors: the weights of a checkpoint decide dtypes, and whether
    embedding and head are one.

    Args:
        skeleton: of the same configuration.
        wanted: `layout` of the other model.
    """
    made: dict[str, Tensor] = {}
    parameters = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    for name, (first, shape, dtype) in wanted.items():
        owner, _, key = name.rpartition(".")
        if first == name:
            made[name] = torch.empty(shape, dtype=dtype, device="meta")
            if name in parameters:
                made[name] = nn.Parameter(made[name], skeleton.get_parameter(name).requires_grad)
        setattr(skeleton.get_submodule(owner), key, made[first])


def _fill(model: nn.Module, full: Mapping[str, Tensor] | None, device: torch.device, home: torch.device) -> None:
    """Weights and buffers of the first rank for a sharded model that has none on the others.

    Args:
        model: sharded; on the first rank with its weights, on the others on the meta device.
        full: on the first rank, whole weights and buffers by name; elsewhere None.
        device: of this rank.
        home: where the shards lie.
    """
    names = {id(p): name for name, p in reversed([*model.named_parameters(remove_duplicate=False)])}
    tied = {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    if full is None:
        model.to_empty(device=home)
        for name, first in tied.items():  # emptying has parted them
            if name != first:
                owner, _, key = name.rpartition(".")
                setattr(model.get_submodule(owner), key, model.get_parameter(first))
    with torch.no_grad():
        for name, mine in (*model.named_parameters(), *model.named_buffers()):
            values = torch.empty(mine.shape, dtype=mine.dtype, device=device) if full is None else full[name].to(device)
            dist.broadcast(values, 0)
            if isinstance(mine, DTensor):
                start, rows = local_rows(mine)
                mine.to_local().copy_(values[start : start + rows])
            elif full is None:
                mine.copy_(values)
