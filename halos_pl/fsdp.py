"""The strategy `fsdp`: policy and reference in shards over all ranks, or over groups of them (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from halos_pl.checkpoints import open_checkpoint, save_checkpoint
from halos_pl.parallel import Plan

NAMES = ("fsdp", "fsdp2")


class MixedAtBorders(Precision):
    """Mixed precision in name: FSDP2 casts at the borders of its units, and the trainer casts nothing."""

    precision = "bf16-mixed"


class FSDP(ModelParallelStrategy):
    """Fully sharded data parallelism: every rank holds a share of both models, of the gradients and of the optimizer's
    state, and gathers one layer at a time (Rajbhandari et al. 2020; Zhao et al. 2023).

    `--trainer.strategy fsdp` on any number of devices, one included, also of CPUs. `--trainer.precision bf16-mixed`
    computes and gathers in bfloat16; weights, gradients and optimizer state stay float32.

    Args:
        replicas: Copies of the shards (HSDP): each group of devices / replicas holds all of the models, and gathers
            among itself; gradients alone go from group to group. As many as nodes keeps gathers inside a node.
        offload_reference: Keep the reference's shards in the host's memory.
        reduce: When gradients are reduced under gradient accumulation: once a `step`, holding whole gradients in
            between, or with every `micro_batch`, holding shards alone.
        checkpoints: `sharded`, each rank writes its share, or `full`, the first rank gathers and writes all.
        process_group_backend: nccl, gloo … Default: by the device.
        timeout: Of a collective.
    """

    strategy_name = "fsdp"

    def __init__(
        self,
        replicas: int = 1,
        offload_reference: bool = False,
        reduce: str = "step",
        checkpoints: str = "sharded",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        for name, value, known in (
            ("reduce", reduce, ("step", "micro_batch")),
            ("checkpoints", checkpoints, ("sharded", "full")),
        ):
            if value not in known:
                raise ValueError(f"strategy fsdp: {name} must be {' or '.join(known)}, got {value!r}")
        if replicas < 1:
            raise ValueError(f"strategy fsdp: replicas must be at least 1, got {replicas}")
        super().__init__(1, 1, checkpoints == "sharded", process_group_backend, timeout)
        self.replicas, self.offload_reference, self.reduce_when = replicas, offload_reference, reduce
        self.full_checkpoints = checkpoints == "full"
        self.plan: Plan | None = None

    # ------------------------------------------------------------------------------------------ the processes

    def setup_environment(self) -> None:
        super(ModelParallelStrategy, self).setup_environment()
        self._setup_distributed()
        world, device = self.world_size, self.root_device
        if world % self.replicas:
            raise ValueError(f"strategy fsdp: {world} devices make no {self.replicas} replicas of equal size")
        if self.offload_reference and device.type == "cpu":
            raise ValueError(
                "strategy fsdp: offload_reference moves shards to the host's memory; on a CPU they are there"
            )
        shape = (world,) if self.replicas == 1 else (self.replicas, world // self.replicas)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        if isinstance(self.precision_plugin, MixedPrecision):
            if self.precision_plugin.precision != "bf16-mixed":
                raise ValueError("strategy fsdp: of the mixed precisions, bf16-mixed alone")
            self.precision_plugin = MixedAtBorders()
        self._device_mesh = mesh
        self.plan = Plan(mesh, device, isinstance(self.precision_plugin, MixedAtBorders))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup(self, trainer: Any) -> None:
        # inference mode before a first backward would leave tensors that autograd cannot save
        trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        """All but the shards that stay in the host's memory, and each model by itself: FSDP2 has moved them."""
        module = self.lightning_module
        assert module is not None
        for name, child in module.named_children():
            if name == "reference" and self.offload_reference:
                for owner in child.modules():
                    for key, buffer in owner.named_buffers(recurse=False):
                        setattr(owner, key, buffer.to(self.root_device))
            else:
                child.to(self.root_device)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Micro-batches of an accumulation but the last: gradients are not reduced."""
        assert self.model is not None
        if self.reduce_when == "micro_batch":
            yield
            return
        units = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)

    # ------------------------------------------------------------------------------------------ checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        return getattr(optimizer, "optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        save_checkpoint(checkpoint, Path(self.broadcast(filepath)), full=self.full_checkpoints)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        parameters: Mapping[str, nn.Parameter] = {}
        if self.lightning_module is not None:
            parameters = dict(self.lightning_module.named_parameters())
        return open_checkpoint(Path(self.broadcast(checkpoint_path))).load(parameters)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)


def refuse_others(strategy: Strategy | str | None) -> None:
    """Of Lightning's strategies, those on one device and DDP alone leave both models and their heads as they are.

    Args:
        strategy: or its name.

    Raises:
        ValueError: naming what to take.
    """
    if isinstance(strategy, str):
        name, fits = strategy, strategy in NAMES or not strategy.startswith(("deepspeed", "fsdp", "model_parallel"))
    else:
        name = type(strategy).__name__
        fits = strategy is None or isinstance(strategy, (FSDP, DDPStrategy, SingleDeviceStrategy))
    if not fits:
        raise ValueError(
            f"--trainer.strategy {name} does not go with two models behind one loss: `fsdp` shards both over all "
            "devices, `ddp` gives each device a copy"
        )


def register() -> None:
    """Make `fsdp` and `fsdp2` names of the strategy; Lightning's own `fsdp` is FSDP1."""
    for name in NAMES:
        StrategyRegistry.register(name, FSDP, description="FSDP2: policy and reference in shards", override=True)
    if "fsdp" in (known := FSDPStrategy.get_registered_strategies()):
        known.remove("fsdp")  # those are refused on CPUs
