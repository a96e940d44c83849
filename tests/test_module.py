"""The training step against a plain loop over logits in float64, and what must not change a trajectory.

The file is long because the naive loop and the fixtures of a trajectory serve every test of the step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from halos_pl.batch import Batch
from halos_pl.data import AlignmentData
from halos_pl.data.collate import Collator, Item
from halos_pl.losses import BCO, DPO, KTO, SFT, Objective
from halos_pl.models import ModelError
from halos_pl.module import AlignmentModule
from halos_pl.parallel import decoder_layers

GOLDEN = Path(__file__).parent / "golden" / "trajectories.json"
STEPS, BATCH, LR = 20, 8, 0.01
OBJECTIVES: dict[str, Objective] = {
    "sft": SFT(),
    "dpo": DPO(beta=0.5),
    "kto": KTO(beta=0.5, undesirable_weight=1.5),
    "kto_without_z0": KTO(beta=0.5, undesirable_weight=1.5, reference_point=False),
}


class Losses(Logger):
    """Keeps train/loss of every optimizer step."""

    name, version = "losses", 0

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "train/loss" in metrics:
            self.values.append(metrics["train/loss"])

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


def make(objective: Objective, model: Path, file: Path, **data: Any) -> tuple[AlignmentModule, AlignmentData]:
    module = AlignmentModule(
        objective,
        policy=str(model),
        dtype="float64",
        optimizer=lambda params: torch.optim.SGD(params, lr=LR, momentum=0.9),
        schedule="constant",
        warmup=0,
    )
    return module, AlignmentData(train=str(file), **{"batch_size": BATCH, "seed": 3} | data)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **defaults | options)


def trajectory(objective: Objective, model: Path, file: Path, accumulate: int = 1, **data: Any) -> list[float]:
    losses = Losses()
    module, datamodule = make(objective, model, file, **data)
    trainer(logger=losses, accumulate_grad_batches=accumulate).fit(module, datamodule=datamodule)
    return losses.values


# -------------------------------------------------------------------------------------------------- the truth


def naive_logps(model: PreTrainedModel, rows: Sequence[tuple[Any, Any]]) -> list[Tensor]:
    """Token log-probabilities of each completion: one row at a time, no padding, from whole logits."""
    out = []
    for prompt, completion in rows:
        ids = torch.tensor([*prompt, *completion]).long()[None]
        logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        out.append(logps.gather(1, ids[0, len(prompt) :, None])[:, 0])
    return out


def naive_loss(
    objective: Objective, model: PreTrainedModel, reference: PreTrainedModel, items: Sequence[Item]
) -> Tensor:
    examples = [e for column in zip(*(item.examples for item in items), strict=True) for e in column]
    rows = [(e.prompt, e.completion) for e in examples]
    logps = naive_logps(model, rows)
    if isinstance(objective, SFT):
        return -torch.cat(logps).mean()
    policy = torch.stack([x.sum() for x in logps])
    with torch.no_grad():
        ratio = policy - torch.stack([x.sum() for x in naive_logps(reference, rows)])
    ratio = policy - (policy - ratio).detach()
    if isinstance(objective, DPO):
        chosen, rejected = ratio.chunk(2)
        return -F.logsigmoid(objective.beta * (chosen - rejected)).mean()
    assert isinstance(objective, KTO)
    z0 = torch.zeros((), dtype=torch.float64)
    if objective.reference_point:
        with torch.no_grad():
            pairs = [(item.examples[0].prompt, item.mismatched[0]) for item in items if item.mismatched]
            differences = zip(naive_logps(model, pairs), naive_logps(reference, pairs), strict=True)
            z0 = torch.stack([(a - b).sum() for a, b in differences]).mean().clamp_min(0)
    desirable = torch.tensor([bool(e.desirable) for e in examples])
    gain = 1 - torch.sigmoid(objective.beta * (ratio - z0))
    loss = 1 - torch.sigmoid(objective.beta * (z0 - ratio))
    return torch.where(desirable, objective.desirable_weight * gain, objective.undesirable_weight * loss).mean()


def naive_trajectory(objective: Objective, model_folder: Path, file: Path) -> list[float]:
    module, data = make(objective, model_folder, file)
    data.needs = module.data_needs
    data.setup("fit")
    model, reference = (AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64) for _ in range(2))
    model.eval()
    reference.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    loader = data.train_dataloader()
    losses: list[float] = []
    epoch = 0
    while len(losses) < STEPS:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        order = [row for batch in loader.sampler for row in batch]
        for start in range(0, len(order), BATCH):
            loss = naive_loss(objective, model, reference, [loader.dataset[i] for i in order[start : start + BATCH]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        epoch += 1
    return losses[:STEPS]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_follows_the_naive_loop(name: str, tiny_model: Path, pairs_file: Path) -> None:
    truth = naive_trajectory(OBJECTIVES[name], tiny_model, pairs_file)
    ours = trajectory(OBJECTIVES[name], tiny_model, pairs_file)
    assert len(ours) == STEPS
    assert ours == pytest.approx(truth, abs=1e-9)
    assert max(ours) - min(ours) > 1e-3, "nothing was learned, so nothing was tested"


# -------------------------------------------------------------------------------------------------- golden runs


@pytest.mark.parametrize("name", OBJECTIVES)
def test_golden_trajectory(name: str, tiny_model: Path, pairs_file: Path) -> None:
    """Pinned; after a change that is meant to change them: HALOS_WRITE_GOLDEN=1 pytest tests/test_module.py"""
    losses = trajectory(OBJECTIVES[name], tiny_model, pairs_file)
    pinned = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("HALOS_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(pinned | {name: losses}, indent=1) + "\n")
        return
    assert losses == pytest.approx(pinned[name], abs=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_does_not_change_it(name: str, tiny_model: Path, pairs_file: Path) -> None:
    plain = trajectory(OBJECTIVES[name], tiny_model, pairs_file)
    for layout in ({"pad_to_multiple_of": 64}, {"length_groups": 1}, {"length_groups": 5}):
        padded = trajectory(OBJECTIVES[name], tiny_model, pairs_file, **layout)
        assert padded == pytest.approx(plain, abs=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_order_inside_a_batch_does_not_change_it(
    name: str, tiny_model: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trajectory(OBJECTIVES[name], tiny_model, pairs_file)
    collate = Collator.__call__

    def reversed_batch(self: Collator, items: Sequence[Item]) -> Batch:
        return collate(self, items[::-1])

    monkeypatch.setattr(Collator, "__call__", reversed_batch)
    assert trajectory(OBJECTIVES[name], tiny_model, pairs_file) == pytest.approx(plain, abs=1e-9)


@pytest.mark.parametrize("name", [x for x in OBJECTIVES if x != "kto"])
def test_accumulation_does_not_change_it(name: str, tiny_model: Path, pairs_file: Path) -> None:
    whole = trajectory(OBJECTIVES[name], tiny_model, pairs_file)
    halves = trajectory(OBJECTIVES[name], tiny_model, pairs_file, accumulate=2, batch_size=BATCH // 2)
    assert halves == pytest.approx(whole, abs=1e-9)


def test_accumulation_changes_kto_only_through_z0(tiny_model: Path, pairs_file: Path) -> None:
    """z0 is a mean over the micro-batch: documented in the README with the figure that this run gives."""
    whole = trajectory(OBJECTIVES["kto"], tiny_model, pairs_file)
    halves = trajectory(OBJECTIVES["kto"], tiny_model, pairs_file, accumulate=2, batch_size=BATCH // 2)
    difference = max(abs(a - b) for a, b in zip(whole, halves, strict=True))
    assert whole[0] == pytest.approx(halves[0], abs=1e-12), "policy == reference: z0 is 0 either way"
    print(f"largest difference of a loss over {STEPS} steps: {difference:.3f} nats")
    assert 1e-6 < difference < 0.1


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_cut_accumulation_window_is_a_mean_too(name: str, tiny_model: Path, pairs_file: Path) -> None:
    """An epoch of 96 (or 192) rows in windows of 5 micro-batches of 8 ends in a short window: Lightning would divide
    its gradient by 5 all the same."""
    steps = -(-96 // 40)
    whole = trajectory(OBJECTIVES[name], tiny_model, pairs_file, batch_size=40)[:steps]
    parts = trajectory(OBJECTIVES[name], tiny_model, pairs_file, accumulate=5)[: steps + 1]
    assert parts[:steps] == pytest.approx(whole, abs=1e-9)
    assert trajectory(OBJECTIVES[name], tiny_model, pairs_file, batch_size=40)[steps] == pytest.approx(
        parts[steps], abs=1e-9
    )


# -------------------------------------------------------------------------------------------------- z0, reference


def first_batch(module: AlignmentModule, data: AlignmentData) -> Batch:
    data.needs = module.data_needs
    data.setup("fit")
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_log_ratio_is_exactly_zero_where_policy_is_reference(dtype: Any, tiny_model: Path, thumbs_file: Path) -> None:
    module, data = make(KTO(), tiny_model, thumbs_file)
    module = AlignmentModule(KTO(beta=0.1), policy=str(tiny_model), dtype=dtype)
    module.configure_model()
    module.train()
    result = module.evaluate(first_batch(module, data))
    assert (result.scores.logratio == 0).all()
    assert result.z0 is not None
    assert result.z0 == 0
    assert (result.losses == 0.5).all()


def perturbed(objective: Objective, model: Path, reference: str = "copy") -> AlignmentModule:
    module = AlignmentModule(objective, policy=str(model), reference=reference, dtype="float64")
    module.configure_model()
    assert module.policy is not None
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def test_weights_reference_and_z0_each_change_the_loss(tiny_model: Path, thumbs_file: Path) -> None:
    base = perturbed(KTO(beta=0.5), tiny_model)
    batch = first_batch(base, make(KTO(), tiny_model, thumbs_file)[1])
    with torch.no_grad():
        losses = base.evaluate(batch).losses
        weighted = perturbed(KTO(beta=0.5, desirable_weight=2.0), tiny_model).evaluate(batch).losses
        desirable = batch.desirable  # type: ignore[attr-defined]
        assert torch.equal(weighted, torch.where(desirable, 2 * losses, losses))

        assert base.evaluate(batch).kl_raw != 0
        shifted = perturbed(KTO(beta=0.5), tiny_model)
        assert shifted.reference is not None
        shifted.reference.load_state_dict(base.policy.state_dict())  # type: ignore[union-attr]
        assert (shifted.evaluate(batch).scores.logratio == 0).all()
        assert not torch.allclose(shifted.evaluate(batch).losses, losses)


def test_no_gradient_reaches_reference_or_z0(tiny_model: Path, thumbs_file: Path) -> None:
    module = perturbed(KTO(beta=0.5), tiny_model)
    result = module.evaluate(first_batch(module, make(KTO(), tiny_model, thumbs_file)[1]))
    assert result.z0 is not None
    assert not result.z0.requires_grad
    result.losses.sum().backward()
    assert module.reference is not None
    assert all(p.grad is None for p in module.reference.parameters())
    assert any(p.grad is not None for p in module.policy.parameters())  # type: ignore[union-attr]


def test_without_a_reference_kto_uses_mean_logps_and_an_unclamped_z0(tiny_model: Path, thumbs_file: Path) -> None:
    """KTO paper (ICML), reference-free variant. Clamped, z0 would always be 0: log-probabilities are negative."""
    module = perturbed(KTO(beta=0.5), tiny_model, reference="none")
    assert module.reference is None
    batch = first_batch(module, make(KTO(), tiny_model, thumbs_file)[1])
    with torch.no_grad():
        result = module.evaluate(batch)
    assert torch.allclose(result.scores.logratio, result.scores.logp / result.scores.length)
    assert result.z0 is not None
    assert result.z0 < 0
    assert result.z0 == result.kl_raw


def test_objectives_load_only_what_they_need(tiny_model: Path) -> None:
    sft = AlignmentModule(SFT(), policy=str(tiny_model))
    sft.configure_model()
    assert sft.reference is None
    assert not sft.data_needs.mismatched
    assert AlignmentModule(KTO(), policy=str(tiny_model)).data_needs.mismatched
    assert not AlignmentModule(KTO(reference_point=False), policy=str(tiny_model)).data_needs.mismatched
    with pytest.raises(ValueError, match="DPO compares policy and reference"):
        AlignmentModule(DPO(), policy=str(tiny_model), reference="none")
    with pytest.raises(ValueError, match="SFT compares with no reference"):
        AlignmentModule(SFT(), policy=str(tiny_model), reference=str(tiny_model))


# -------------------------------------------------------------------------------------------------- training


def test_checkpoints_leave_the_reference_out_and_load_back(tiny_model: Path, thumbs_file: Path, tmp_path: Path) -> None:
    module, data = make(KTO(beta=0.5), tiny_model, thumbs_file)
    run = trainer(max_steps=5)
    run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "five.ckpt")
    state = torch.load(tmp_path / "five.ckpt", weights_only=True)["state_dict"]
    assert state
    assert not [key for key in state if key.startswith("reference.")]

    resumed, data = make(KTO(beta=0.5), tiny_model, thumbs_file)
    trainer(max_steps=5).fit(resumed, datamodule=data, ckpt_path=tmp_path / "five.ckpt")
    for name in ("policy", "reference"):
        old, new = (getattr(x, name).state_dict() for x in (module, resumed))
        assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1.0] * 10),
        ("constant", 4, [0.25, 0.5, 0.75] + [1.0] * 7),
        ("linear", 0.5, [0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0]),
        ("cosine", 0, [0.9755, 0.9045, 0.7939, 0.6545, 0.5, 0.3455, 0.2061, 0.0955, 0.0245, 0.0]),
    ],
)
def test_schedules(schedule: Any, warmup: float, expected: list[float], tiny_model: Path, thumbs_file: Path) -> None:
    seen: list[float] = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0])

    module = AlignmentModule(
        SFT(),
        policy=str(tiny_model),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        schedule=schedule,
        warmup=warmup,
    )
    data = AlignmentData(train=str(thumbs_file), batch_size=4)
    trainer(Rates(), max_steps=10, gradient_clip_val=1e-6).fit(module, datamodule=data)
    assert seen == pytest.approx(expected, abs=1e-4)  # after each step's scheduler update


def test_gradient_checkpointing_and_dropout(tiny_model: Path, pairs_file: Path) -> None:
    plain, data = make(DPO(beta=0.5), tiny_model, pairs_file)
    options = {"policy": str(tiny_model), "dtype": "float64"}
    saving = AlignmentModule(DPO(beta=0.5), gradient_checkpointing=True, **options)  # type: ignore[arg-type]
    noisy = AlignmentModule(DPO(beta=0.5), dropout=True, **options)  # type: ignore[arg-type]
    batch = first_batch(plain, data)
    grads = []
    for module in (plain, saving, noisy):
        module.configure_model()
        module.train()
        assert module.policy is not None
        module.evaluate(batch).losses.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in module.policy.parameters() if p.grad is not None]))
    assert torch.allclose(grads[0], grads[1], atol=1e-12)
    assert not torch.allclose(grads[0], grads[2], atol=1e-3), "dropout: true must be honoured"


def test_clipping_and_the_logged_norm(tiny_model: Path, pairs_file: Path) -> None:
    norms: dict[float | None, float] = {}
    for clip in (None, 0.01):
        module, data = make(DPO(beta=0.5), tiny_model, pairs_file)
        before = {}
        module.configure_model()
        before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        run = trainer(max_steps=1, gradient_clip_val=clip)
        run.fit(module, datamodule=data)
        norms[clip] = float(run.callback_metrics["train/grad_norm"])
        moved = torch.stack([(p - before[n]).norm() for n, p in module.named_parameters() if n in before]).norm()
        assert moved.item() == pytest.approx(LR * (norms[clip] if clip is None else clip), rel=1e-3)
    assert norms[None] == pytest.approx(norms[0.01]), "the norm before clipping"


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "32-true"), ("float32", "bf16-mixed")])
def test_training_in_bfloat16(dtype: Any, precision: Any, tiny_model: Path, pairs_file: Path) -> None:
    """Starts at exactly log 2, since the log-ratio of equal models is 0 in any precision, and then learns."""
    losses = Losses()
    module = AlignmentModule(
        DPO(beta=0.5),
        policy=str(tiny_model),
        dtype=dtype,
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3),
        schedule="constant",
        warmup=0,
    )
    data = AlignmentData(train=str(pairs_file), batch_size=BATCH)
    trainer(logger=losses, max_steps=30, precision=precision).fit(module, datamodule=data)
    assert losses.values[0] == pytest.approx(0.6931471805599453, abs=1e-7)
    assert sum(losses.values[-6:]) / 6 < 0.6
    assert {p.dtype for p in module.policy.parameters()} == {getattr(torch, dtype)}  # type: ignore[union-attr]


def test_a_loss_that_is_not_finite_ends_the_run(tiny_model: Path, pairs_file: Path) -> None:
    module = AlignmentModule(
        DPO(), policy=str(tiny_model), optimizer=lambda p: torch.optim.SGD(p, lr=1e30), schedule="constant", warmup=0
    )
    data = AlignmentData(train=str(pairs_file), batch_size=BATCH)
    with pytest.raises(ModelError, match=r"must not be NaN, got .* at step .*nothing is exported"):
        trainer(log_every_n_steps=50).fit(module, datamodule=data)


@pytest.mark.slow
def test_compiled_layers_compute_the_same(tiny_model: Path, thumbs_file: Path) -> None:
    """Needs a C++ compiler."""
    losses = []
    for compiled in (False, True):
        module, data = make(KTO(beta=0.5), tiny_model, thumbs_file)
        module.compile_layers = compiled
        record = Losses()
        trainer(max_steps=3, logger=record).fit(module, datamodule=data)
        assert module.policy is not None
        layers = decoder_layers(module.policy)
        assert [layer._compiled_call_impl is not None for layer in layers] == [compiled] * 2
        losses.append(record.values)
    assert losses[1] == pytest.approx(losses[0], abs=1e-9)


def test_settings_of_the_run_win_over_those_of_a_checkpoint(
    tiny_model: Path, thumbs_file: Path, tmp_path: Path
) -> None:
    """Lightning and torch would go on with the learning rate and momentum that the optimizer's state brings."""
    module, data = make(KTO(beta=0.5), tiny_model, thumbs_file)
    run = trainer(max_steps=2)
    run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "two.ckpt")
    sgd = {"momentum": 0.25, "lr": 0.5}
    other = AlignmentModule(
        KTO(beta=0.7),
        policy=str(tiny_model),
        optimizer=lambda params: torch.optim.SGD(params, **sgd),
        schedule="linear",
        warmup=0,
    )
    data = AlignmentData(train=str(thumbs_file), batch_size=8)
    again = trainer(max_steps=4)
    seen: list[tuple[float, float]] = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
            group = trainer.optimizers[0].param_groups[0]
            seen.append((group["lr"], group["momentum"]))

    again.callbacks.append(Look())  # type: ignore[attr-defined]
    again.fit(other, datamodule=data, ckpt_path=tmp_path / "two.ckpt")
    assert again.global_step == 4
    assert seen == [(0.25, 0.25), (0.125, 0.25)], "half way down the line, then three quarters"


def test_a_checkpoint_of_another_objective_optimizer_or_model_is_refused(
    tiny_model: Path, thumbs_file: Path, tmp_path: Path
) -> None:
    module, data = make(KTO(beta=0.5), tiny_model, thumbs_file)
    run = trainer(max_steps=2)
    run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "two.ckpt")
    other, data = make(BCO(beta=0.5), tiny_model, thumbs_file)
    with pytest.raises(ModelError, match="objective was KTO, now BCO; to begin anew"):
        trainer(max_steps=4).fit(other, datamodule=data, ckpt_path=tmp_path / "two.ckpt")
    adam = AlignmentModule(KTO(beta=0.5), policy=str(tiny_model), schedule="constant", warmup=0)
    with pytest.raises(ModelError, match=r"optimizer was SGD, now AdamW"):
        trainer(max_steps=4).fit(adam, datamodule=data, ckpt_path=tmp_path / "two.ckpt")
    config = {"model_type": "llama", "vocab_size": 260, "hidden_size": 16, "intermediate_size": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    small = AlignmentModule(
        KTO(beta=0.5),
        config=config,
        tokenizer=str(tiny_model),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        schedule="constant",
        warmup=0,
    )
    with pytest.raises(ModelError, match=r"the checkpoint is of another model: it has no policy\.lm"):
        trainer(max_steps=4).fit(small, datamodule=data, ckpt_path=tmp_path / "two.ckpt")


def test_misuse_in_python_is_explained(tiny_model: Path) -> None:
    with pytest.raises(TypeError, match="objective must be an instance"):
        AlignmentModule(KTO, policy=str(tiny_model))  # type: ignore[arg-type]
    module = AlignmentModule(KTO(), policy=str(tiny_model))
    with pytest.raises(RuntimeError, match="configure_model"):
        module.score(None)  # type: ignore[arg-type]
