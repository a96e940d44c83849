"""From a trained module to folders that other programs load."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from halos_pl.data import AlignmentData
from halos_pl.models import export_adapter, export_policy, merged
from halos_pl.module import AlignmentModule
from halos_pl.parallel import gathered


def whole_weights(module: AlignmentModule) -> dict[str, Tensor] | None:
    """The policy's weights by name, whole, on the first rank; None where they are not sharded. All ranks take part."""
    assert module.policy is not None
    if not isinstance(module.policy, FSDPModule):
        return None
    return {name: x for name, x in gathered(module.policy.lm.state_dict()) if x is not None}


def adapter_beside(policy: Path) -> Path:
    """The folder of an adapter beside that of the policy: policy-step=4 and adapter-step=4, mine and mine-adapter."""
    name = policy.name
    return policy.with_name(name.replace("policy", "adapter", 1) if name.startswith("policy") else f"{name}-adapter")


def hand_over(
    module: AlignmentModule,
    data: AlignmentData,
    folder: Path,
    card: str,
    weights: dict[str, Tensor] | None = None,
    *,
    name: str = "policy",
) -> dict[str, str]:
    """Write the policy, with adapters merged where they can be, and the adapters.

    Args:
        module: trained.
        data: with the tokenizer that it was trained with.
        folder: of the run.
        card: text of README.md.
        weights: of `whole_weights`.
        name: of the policy's folder in it; the adapter's is named alike.

    Returns:
        what lies where, for people.
    """
    assert module.policy is not None
    lm, places = module.policy.lm, {"policy": f"{folder / name}  (AutoModelForCausalLM.from_pretrained)"}
    if module.lora is not None:
        adapter = adapter_beside(folder / name)
        export_adapter(lm, adapter, module.source.name, state=weights)
        places["adapter"] = f"{adapter}  (peft.PeftModel.from_pretrained)"
        if module.lora.quantize != "none":
            return places | {"policy": "not written: adapters are not merged into quantized weights"}
        lm, weights = merged(lm, weights), None
    made_here = module.source.config is not None
    export_policy(lm, data.sampling_tokenizer, folder / name, card, adopt_ids=made_here, weights=weights)
    return places
