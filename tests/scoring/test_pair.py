"""Which models a run holds, and what each of them scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from halos_pl.batch import Sequences
from halos_pl.data.collate import sequences
from halos_pl.models import LoRA, ModelError, ModelSource, export_adapter
from halos_pl.scoring import Scorer, SharedReference, compare, load_pair, score_both

IDS = torch.arange(3, 51).reshape(3, 16)


@pytest.fixture
def source(tiny_model: Path) -> ModelSource:
    return ModelSource(str(tiny_model))


@pytest.fixture
def rows() -> Sequences:
    return sequences([(row[:4].numpy(), row[4:].numpy()) for row in IDS], pad_id=0, vocab_size=260)


def of_base(folder: Path, rows: Sequences, dtype: Any = "auto") -> Tensor:
    with torch.no_grad():
        return Scorer(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())(rows).logp


def move(policy: Scorer) -> None:
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05)


def test_without_adapters_the_copy_is_a_second_model(source: ModelSource) -> None:
    policy, reference = load_pair(source, source)
    assert isinstance(reference, Scorer)
    assert not reference.training
    assert not {x.data_ptr() for x in policy.parameters()} & {x.data_ptr() for x in reference.parameters()}
    assert load_pair(source, None)[1] is None


def test_with_adapters_there_is_one_model(source: ModelSource, rows: Sequences, tiny_model: Path) -> None:
    policy, reference = load_pair(source, source, LoRA(r=2))
    assert isinstance(reference, SharedReference)
    assert str(reference) == "the policy with its adapters off"
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    adapters = 2 * sum(2 * (inputs + outputs) for inputs, outputs in ((32, 96), (32, 32), (32, 128), (128, 32)))
    assert sum(p.numel() for p in policy.parameters()) == base + adapters
    assert adapters == sum(p.numel() for p in policy.parameters() if p.requires_grad)

    module = torch.nn.Module()
    module.reference = reference  # type: ignore[assignment]
    assert not list(module.state_dict()), "nothing of it is stored"
    truth = of_base(tiny_model, rows)
    assert torch.equal(reference(rows).logp, truth)
    move(policy)
    assert torch.equal(reference(rows).logp, truth), "it does not move with the policy"
    assert not torch.equal(policy(rows).logp, truth)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("gradients", [True, False])
def test_log_ratios_begin_at_0_exactly(gradients: bool, dtype: str, tiny_model: Path, rows: Sequences) -> None:
    source = ModelSource(str(tiny_model), dtype=dtype)
    policy, reference = load_pair(source, source, LoRA(r=2))
    assert reference is not None
    with torch.set_grad_enabled(gradients):
        ours, theirs = score_both(policy, reference, rows, entropy=True)
        assert torch.equal(ours.logp, theirs.logp)
        assert not compare(ours, theirs, rows).logratio.any()
        move(policy)
        ours, theirs = score_both(policy, reference, rows, entropy=True)
    assert ours.entropy is not None
    assert ours.logp.requires_grad == gradients
    assert not theirs.logp.requires_grad
    assert torch.equal(theirs.logp, of_base(tiny_model, rows, getattr(torch, dtype)))
    assert compare(ours, theirs, rows).logratio.abs().max() > 1e-2


def test_the_reference_drops_nothing_out_and_leaves_the_policys_mode(source: ModelSource, rows: Sequences) -> None:
    policy, reference = load_pair(source, source, LoRA(r=2, dropout=0.5))
    assert isinstance(reference, SharedReference)
    move(policy)
    for training in (True, False):
        policy.train(training)
        assert torch.equal(reference(rows).logp, reference(rows).logp)
        assert all(module.training == training for module in policy.modules())
    policy.train()
    assert not torch.equal(policy(rows).logp, policy(rows).logp)


def test_without_dropout_it_scores_in_the_policys_mode(source: ModelSource, rows: Sequences) -> None:
    """bitsandbytes' 8-bit layers round otherwise in evaluation mode."""
    policy, reference = load_pair(source, source, LoRA(r=2))
    assert isinstance(reference, SharedReference)
    modes = []
    policy.lm.transformer.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    for training in (True, False):
        policy.train(training)
        reference(rows)
    assert modes == [True, False]


def test_the_models_own_dropout_is_off_in_the_reference(tiny_model: Path, rows: Sequences) -> None:
    source = ModelSource(str(tiny_model), dropout=True)
    policy, reference = load_pair(source, source, LoRA(r=2))
    assert isinstance(reference, SharedReference)
    policy.train()
    assert not torch.equal(policy(rows).logp, policy(rows).logp)
    assert torch.equal(reference(rows).logp, of_base(tiny_model, rows))


@pytest.fixture
def adapter(source: ModelSource, tiny_model: Path, tmp_path: Path) -> Path:
    policy, _ = load_pair(source, source, LoRA(r=2))
    move(policy)
    export_adapter(policy.lm, tmp_path / "adapter", str(tiny_model))
    return tmp_path / "adapter"


def test_going_on_with_an_adapter_the_reference_is_its_merge(
    source: ModelSource, adapter: Path, tiny_model: Path, rows: Sequences
) -> None:
    policy, reference = load_pair(source, source, LoRA(adapter=str(adapter)))
    assert isinstance(reference, SharedReference)
    assert str(reference) == "the policy with the adapter that it began with"
    start = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).merge_and_unload()
    ours, theirs = score_both(policy, reference, rows)
    assert torch.equal(ours.logp, theirs.logp)
    with torch.no_grad():
        torch.testing.assert_close(theirs.logp, Scorer(start.eval())(rows).logp, atol=2e-5, rtol=0)
    assert (theirs.logp - of_base(tiny_model, rows)).abs().max() > 1e-2
    move(policy)
    assert torch.equal(reference(rows).logp, theirs.logp)


def test_going_on_with_an_adapter_against_the_base_itself(
    source: ModelSource, adapter: Path, tiny_model: Path, rows: Sequences
) -> None:
    """`--model.reference` names the policy's folder: the base is meant, and not the adapter that goes on."""
    policy, reference = load_pair(source, ModelSource(str(tiny_model)), LoRA(adapter=str(adapter)))
    assert isinstance(reference, SharedReference)
    assert torch.equal(reference(rows).logp, of_base(tiny_model, rows))
    assert not [name for name, _ in policy.named_parameters() if ".start." in name]


def test_another_reference_is_a_model_of_its_own(source: ModelSource, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(tiny_model)
    policy, reference = load_pair(source, ModelSource(str(tmp_path / "other")), LoRA(r=2))
    assert isinstance(reference, Scorer)
    assert not [name for name, _ in reference.named_parameters() if "lora_" in name]
    assert not any(p.requires_grad for p in reference.parameters())
    assert sum(p.requires_grad for p in policy.parameters()) == 2 * 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_critics_value_head_is_trained_beside_adapters(dtype: str, tiny_model: Path, rows: Sequences) -> None:
    source = ModelSource(str(tiny_model), dtype=dtype)
    policy, reference = load_pair(source, source, LoRA(r=2), value_head=True, checkpointing=True)
    assert policy.value_head is not None
    assert policy.value_head.weight.dtype == torch.float32
    assert policy.value_head.weight.requires_grad
    assert reference is not None
    ours, _ = score_both(policy.train(), reference, rows)
    assert ours.value is not None
    (ours.logp.sum() + ours.value.sum()).backward()
    grads = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert grads == {name for name, p in policy.named_parameters() if "lora_" in name or "value_head" in name}


def test_an_adapter_that_does_not_fit_is_refused(source: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not an adapter's folder"):
        load_pair(source, source, LoRA(adapter=str(tmp_path)))


def test_state_comes_back(source: ModelSource, rows: Sequences) -> None:
    """Names are those of the base, with `base_layer` and the adapter's parts within."""
    policy, _ = load_pair(source, source, LoRA(r=2))
    move(policy)
    state = policy.state_dict()
    trained = {name: value for name, value in state.items() if "lora_" in name}
    again, _ = load_pair(source, source, LoRA(r=2))
    assert again.state_dict().keys() == state.keys()
    assert again.load_state_dict(trained, strict=False).unexpected_keys == []
    assert torch.equal(again(rows).logp, policy(rows).logp)
