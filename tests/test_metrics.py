"""Logged means by numbers derived by hand, and every name that a run logs against the table of formulas.

The file is long because every name of the table has its derivation here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from halos_pl.batch import Batch, CompletionLogps, PairedBatch, Sequences, SFTBatch, UnpairedBatch
from halos_pl.data import AlignmentData
from halos_pl.data.collate import sequences
from halos_pl.guards import Guards
from halos_pl.losses import BCO, DPO, IPO, KTO, OBJECTIVES, ORPO, SFT, Objective, PPOOffline, SimPO
from halos_pl.metrics import FORMULAS, Averages, batch_values
from halos_pl.module import AlignmentModule, Evaluation

TRAIN_ONLY = {"grad_norm", "skipped", "lr", "tokens_per_second"}


def rows(*lengths: int) -> Sequences:
    return sequences([(torch.ones(2).numpy(), torch.ones(n).numpy()) for n in lengths], pad_id=0, vocab_size=5)


def scores(logp: list[float], logratio: list[float], lengths: tuple[int, ...]) -> CompletionLogps:
    tokens = torch.cat([torch.full((n,), x / n) for x, n in zip(logp, lengths, strict=True)])
    return CompletionLogps(torch.tensor(logratio), torch.tensor(logp), torch.tensor(lengths), tokens)


def unpaired(
    desirable: list[bool], rewards: list[float], losses: list[float], kl_raw: float = 0.0, mismatched: int = 1
) -> dict[str, Any]:
    """A micro-batch whose log-probabilities are ten times its rewards."""
    lengths = tuple(range(1, len(rewards) + 1))
    return batch_values(
        UnpairedBatch(rows(*lengths), rows(*[1] * mismatched), desirable=torch.tensor(desirable)),
        scores([10 * r for r in rewards], rewards, lengths),
        torch.tensor(losses),
        torch.tensor(rewards),
        torch.tensor(max(0.0, kl_raw)),
        torch.tensor(kl_raw),
    )


def mean(*micro_batches: dict[str, Any]) -> dict[str, float]:
    averages = Averages()
    for values in micro_batches:
        averages.update(values)
    return {name: value.item() for name, value in averages.compute().items()}


# -------------------------------------------------------------------------------------------------- means


def test_means_are_over_examples_not_over_micro_batches() -> None:
    found = mean(
        unpaired([True, True, False], [1.0, 2.0, -3.0], [0.1, 0.2, 0.3], kl_raw=3.0, mismatched=3),
        unpaired([False], [-5.0], [1.0], kl_raw=-1.0, mismatched=1),
    )
    expected = {
        "loss": 1.6 / 4,
        "rewards/desirable": 1.5,
        "rewards/undesirable": -4.0,
        "rewards/margin": 5.5,
        "rewards/accuracy": 2 / 4,  # r > z0 = 3 for none of the first three; −5 > 0 is false: two undesirable hits
        "logps/desirable": 15.0,
        "logps/undesirable": -40.0,
        "token_nll": 50 / 7,  # −Σ logp / Σ tokens of 1 + 2 + 3 + 1 tokens; the mean of rows would differ
        "completion_tokens": 7 / 4,
        "kl": 9 / 4,  # 3 over three rows, 0 over one
        "kl_raw": 8 / 4,
        "kl_unclamped": 1 / 2,  # of micro-batches
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_class_that_is_absent_from_a_batch_adds_nothing() -> None:
    both = unpaired([True, False], [1.0, -1.0], [0.0, 0.0])
    assert mean(both, unpaired([False, False], [-3.0, -5.0], [0.0, 0.0])) == pytest.approx(
        mean(unpaired([True, False, False, False], [1.0, -1.0, -3.0, -5.0], [0.0] * 4))
        | {"completion_tokens": 1.5, "token_nll": 80 / 6}  # rows have 1 and 2 tokens here, 1 to 4 there
    )
    only = mean(unpaired([False], [-3.0], [0.0]))
    assert only["rewards/undesirable"] == -3
    assert not {"rewards/desirable", "rewards/margin", "logps/desirable"} & only.keys(), "left out, not NaN"
    assert not any(math.isnan(value) for value in only.values())


def test_accuracy_of_single_completions_is_against_the_reference_point() -> None:
    found = mean(unpaired([True, True, False, False], [0.4, 0.6, 0.4, 0.6], [0.0] * 4, kl_raw=0.5))
    assert found["rewards/accuracy"] == 0.5
    without = batch_values(
        UnpairedBatch(rows(1, 1), desirable=torch.tensor([True, False])),
        scores([-1.0, -1.0], [0.1, 0.1], (1, 1)),
        torch.zeros(2),
        torch.ones(2),
        None,
        None,
    )
    assert mean(without)["rewards/accuracy"] == 0.5, "against 0 without a reference point"
    assert not [name for name in without if name.startswith("kl")]


def test_pairs() -> None:
    logp, rewards = [-1.0, -4.0, -2.0, -3.0], [0.5, -0.2, 0.1, -0.1]
    batch = PairedBatch(rows(1, 2, 3, 4))
    found = mean(
        batch_values(batch, scores(logp, rewards, (1, 2, 3, 4)), torch.zeros(2), torch.tensor(rewards), None, None)
    )
    assert found["pair_accuracy"] == 0.5  # −1 > −2, but −4 < −3
    assert found["rewards/accuracy"] == 0.5  # 0.5 > 0.1, but −0.2 < −0.1
    assert found["rewards/desirable"] == pytest.approx(0.15)
    assert found["rewards/margin"] == pytest.approx(0.15)
    assert found["logps/undesirable"] == -2.5


def test_a_tie_is_no_hit() -> None:
    values = batch_values(
        PairedBatch(rows(1, 1)), scores([-1.0, -1.0], [0.0, 0.0], (1, 1)), torch.zeros(1), torch.zeros(2), None, None
    )
    assert mean(values)["pair_accuracy"] == mean(values)["rewards/accuracy"] == 0


def test_demonstrations() -> None:
    found = mean(
        batch_values(SFTBatch(rows(1, 3)), scores([-1.0, -6.0], [0.0, 0.0], (1, 3)), torch.ones(4), None, None, None)
    )
    assert found == {"loss": 1.0, "token_nll": 1.75, "completion_tokens": 2.0, "logps/all": -3.5}


def test_sums_are_wide_detached_and_reset() -> None:
    averages = Averages()
    half = torch.full((4096,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    averages.update({"loss": (half, None)})
    averages.update({"loss": (half * 3, None)})
    assert averages.compute()["loss"] == 2
    assert not averages.total.requires_grad
    averages.reset()
    averages.update({"loss": (torch.tensor([5.0]), None)})
    assert averages.compute()["loss"] == 5


def test_a_name_without_a_formula_is_refused() -> None:
    for name in ("rewards/chosen", "rewards/margin"):  # the margin is computed, never averaged
        with pytest.raises(KeyError, match=name):
            Averages().update({name: (torch.ones(1), None)})


def test_update_does_not_wait_for_the_device() -> None:
    """No value is read on the host: on `meta` tensors reading one raises."""
    values = {name: tuple(None if x is None else x.to("meta") for x in pair) for name, pair in both_classes().items()}
    Averages().to("meta").update(values)


def both_classes() -> dict[str, tuple[Tensor, Tensor | None]]:
    return unpaired([True, False], [1.0, -1.0], [0.0, 0.0])


# -------------------------------------------------------------------------------------------------- names


def logged(objective: Objective, model: Path, file: Path) -> dict[str, float]:
    module = AlignmentModule(objective, policy=str(model), schedule="constant", warmup=0, log_entropy=True)
    data = AlignmentData(train=str(file), validation=str(file), batch_size=8, eval_batch_size=32, max_length=64)
    trainer = L.Trainer(
        max_steps=2,
        limit_val_batches=2,
        val_check_interval=2,
        accelerator="cpu",
        log_every_n_steps=1,
        logger=False,
        callbacks=[Guards("skip")],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_every_logged_name_has_a_formula_and_every_formula_is_logged(
    tiny_model: Path, pairs_file: Path, thumbs_file: Path
) -> None:
    runs: list[tuple[Objective, Path]] = [
        (KTO(humanline=(-1.0, 1.5)), thumbs_file),
        (KTO(), pairs_file),
        (DPO(), pairs_file),
        (SFT(), pairs_file),
        (PPOOffline(critic=True), thumbs_file),
    ]
    seen = {stage: set() for stage in ("train", "val")}
    for objective, file in runs:
        values = logged(objective, tiny_model, file)
        assert all(math.isfinite(value) for value in values.values()), values
        for name in values:
            stage, _, short = name.partition("/")
            seen[stage].add(short)
    assert seen["train"] == FORMULAS.keys()
    assert seen["val"] == FORMULAS.keys() - TRAIN_ONLY


def test_batch_values_emits_nothing_else(tiny_model: Path) -> None:
    batches: list[Batch] = [
        SFTBatch(rows(1)),
        PairedBatch(rows(1, 1)),
        UnpairedBatch(rows(1), desirable=torch.ones(1) > 0),
    ]
    for batch in batches:
        n = batch.completions.num_rows
        x = scores([-1.0] * n, [0.0] * n, (1,) * n)
        z0 = torch.zeros(())
        assert batch_values(batch, x, torch.ones(1), torch.zeros(n), z0, z0).keys() < FORMULAS.keys() - TRAIN_ONLY


def test_pair_accuracy_is_the_share_of_likelier_chosen_completions() -> None:
    logp = torch.tensor([-1.0, -5.0, -1.0, -2.0, -3.0, -4.0])  # chosen, chosen, chosen, rejected, rejected, rejected
    scores = CompletionLogps(logp, logp, torch.ones(6).long(), logp)
    rows = sequences([(torch.ones(1).numpy(), torch.ones(1).numpy())] * 6, pad_id=0, vocab_size=5)
    averages = Averages()
    averages.update(batch_values(PairedBatch(rows), scores, logp[:3], logp, None, None))
    assert averages.compute()["pair_accuracy"].item() == pytest.approx(2 / 3)
    assert averages.compute()["rewards/accuracy"].item() == pytest.approx(2 / 3)


# -------------------------------------------------------------------------------------------------- of one objective


def tokens(ratios: list[float], lengths: tuple[int, ...], **more: Any) -> CompletionLogps:
    """Scores of tokens with these probability ratios."""
    logratio = torch.tensor(ratios, dtype=torch.float64).log()
    sums = torch.stack([x.sum() for x in logratio.split(list(lengths))])
    return CompletionLogps(sums, sums, torch.tensor(lengths), logratio, sums, logratio, **more)


def diagnosed(objective: Objective, x: CompletionLogps, desirable: list[bool] | None = None) -> dict[str, float]:
    labels = None if desirable is None else torch.tensor(desirable)
    return mean({name: (value, None) for name, value in objective.diagnostics(x, labels).items()})


def test_unclamped_tokens_lie_inside_the_humanline() -> None:
    x = tokens([1.0] * 5, (2, 3))
    ratios = torch.tensor([-1.0, -0.99, 0.0, 1.49, 1.5], dtype=torch.float64)  # clamped tokens lie on a bound
    x = CompletionLogps(**(vars(x) | {"token_logratio": ratios}))
    for objective in (KTO(humanline=(-1.0, 1.5)), DPO(humanline=(-1.0, 1.5)), BCO(humanline=(-1.0, 1.5))):
        assert diagnosed(objective, x, [True, False]) == {"humanline/unclamped": pytest.approx(3 / 5)}
    assert diagnosed(KTO(humanline=(-0.5, 9.0)), x)["humanline/unclamped"] == pytest.approx(3 / 5)
    assert diagnosed(KTO(humanline=(-9.0, 0.5)), x)["humanline/unclamped"] == pytest.approx(3 / 5)
    assert diagnosed(KTO(), x) == {}


UP, DOWN = [0.2, 0.3, 0.4, 2.5], [0.3, 0.4, 0.6, 3.0]
"""Ratios under a positive advantage, of which the clip stops the last; under a negative one it stops the first two."""


def test_the_share_that_ppo_clips_by_hand() -> None:
    """One bound for every token would give 2/8 or 5/8, the wrong one of the two 4/8, either of them 7/8."""
    ppo = PPOOffline(clip_low=0.5, clip_high=2.0)
    assert diagnosed(ppo, tokens(UP + DOWN, (4, 4)), [True, False])["ppo/clipped"] == 3 / 8
    assert diagnosed(ppo, tokens(UP, (4,)), [True])["ppo/clipped"] == 1 / 4
    assert diagnosed(ppo, tokens(DOWN, (4,)), [False])["ppo/clipped"] == 2 / 4
    assert diagnosed(ppo, tokens([0.5, 2.0] * 2, (2, 2)), [True, False])["ppo/clipped"] == 0, "on a bound is inside"
    scored = PPOOffline(reward="score", clip_low=0.35, clip_high=2.75)
    x = tokens(DOWN + UP, (4, 4), score=torch.tensor([0.25, -3.0]))
    assert diagnosed(scored, x, [False, True])["ppo/clipped"] == 3 / 8, "the sign is the score's: 3.0, and 0.2, 0.3"


def test_clipped_tokens_are_those_without_a_gradient() -> None:
    ratios = torch.linspace(0.2, 3.0, 30, dtype=torch.float64).tolist()
    x = tokens(ratios * 2, (30, 30))
    logratio = x.token_logratio.requires_grad_()  # type: ignore[union-attr]
    labels, ppo = torch.tensor([True, False]), PPOOffline(clip_low=0.7, clip_high=1.4)
    ppo.losses(x, labels).sum().backward()
    assert torch.equal(ppo.diagnostics(x, labels)["ppo/clipped"], logratio.grad == 0)
    assert 0 < (logratio.grad == 0).sum() < 60


def test_the_critics_loss_by_hand() -> None:
    """Returns ½, 1 | −1 against values 0, ½ | 1."""
    x = tokens([1.0, 5.0, 0.1], (2, 1), value=torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True))
    found = diagnosed(PPOOffline(critic=True, gamma=0.5), x, [True, False])
    assert found["ppo/critic_loss"] == pytest.approx((0.125 + 0.125 + 2.0) / 3)
    assert "ppo/critic_loss" not in diagnosed(PPOOffline(), x, [True, False])
    values = PPOOffline(critic=True).diagnostics(x, torch.tensor([True, False])).values()
    assert not any(value.requires_grad for value in values)


@pytest.mark.parametrize("cls", [x for x in OBJECTIVES if x.view == "paired"])
def test_pair_accuracy_is_of_means_where_the_loss_is(cls: type[Objective], tiny_model: Path) -> None:
    """Sums say wrong, wrong, right; means of a token say right, wrong, right."""
    logp, lengths = [-4.0, -6.0, -1.0, -3.0, -2.0, -9.0], (4, 2, 1, 1, 2, 3)
    x, batch = scores(logp, [0.0] * 6, lengths), PairedBatch(rows(*lengths))
    module = AlignmentModule(cls(), policy=str(tiny_model))
    found = mean(module._values(batch, Evaluation(torch.zeros(3), x, None, None, None, {})))
    assert found["pair_accuracy"] == pytest.approx(2 / 3 if cls in (IPO, SimPO, ORPO) else 1 / 3)


def test_kl_of_bco_is_its_running_mean(tiny_model: Path, thumbs_file: Path) -> None:
    """One figure a micro-batch, not one of its rows; nothing is known before a clamp, and it may be negative."""
    batch = UnpairedBatch(rows(1, 1, 1), desirable=torch.tensor([True, True, False]))
    x = scores([-1.0] * 3, [-0.4, -0.4, -0.6], (1, 1, 1))
    found = mean(*(batch_values(batch, x, torch.ones(3), torch.ones(3), torch.tensor(z0), None) for z0 in (-0.5, -0.3)))
    assert found["kl"] == pytest.approx(-0.4)
    assert not {"kl_raw", "kl_unclamped"} & found.keys()
    assert found["rewards/accuracy"] == pytest.approx((1 + 1 / 3) / 2), "against z0: + + − and then − − −"

    module = AlignmentModule(BCO(), policy=str(tiny_model), reference="copy", dtype="float64")
    module.configure_model()
    module.running_mean.total.fill_(-3.0)  # type: ignore[union-attr]
    module.running_mean.count.fill_(2.0)  # type: ignore[union-attr]
    data = AlignmentData(train=str(thumbs_file), batch_size=4)
    data.needs = module.data_needs
    data.setup("fit")
    first = next(iter(data.train_dataloader()))
    module.train().training_step(first, 0)
    assert module.train_averages.compute()["kl"].item() == pytest.approx(-3 / 6), "policy == reference: four zeros"
    module.eval().validation_step(first, 0)
    assert module.val_averages.compute()["kl"].item() == pytest.approx(-3 / 6), "which validation does not add to"
