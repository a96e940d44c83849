"""What Evaluation logs, against plain float64 loops over the model's own logits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from halos_pl.data import AlignmentData, DataError
from halos_pl.evaluate import Evaluation, sample
from halos_pl.evaluate.callback import Said, summary
from halos_pl.losses import KTO, SFT, Objective
from halos_pl.metrics import SAMPLED
from halos_pl.module import AlignmentModule


def is_odd(row: Mapping[str, Any], completion: str) -> bool:
    return (len(completion) + len(row["prompt"])) % 2 == 1


def fit(
    evaluation: Evaluation,
    model: Path,
    file: Path,
    folder: Path,
    objective: Objective = KTO(beta=0.5),  # noqa: B008
) -> tuple[AlignmentModule, dict[str, float]]:
    """Three steps in float64, then a validation."""
    module = AlignmentModule(
        objective, policy=str(model), dtype="float64", optimizer=lambda p: torch.optim.SGD(p, lr=0.05), warmup=0
    )
    data = AlignmentData(train=str(file), validation=str(file), batch_size=8, eval_batch_size=64)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        callbacks=[evaluation],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=-1,
        limit_val_batches=1,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)
    (logged,) = trainer.validate(module, datamodule=data, verbose=False)
    return module, {
        name.removeprefix("val/"): value for name, value in logged.items() if name.removeprefix("val/") in SAMPLED
    }


@torch.no_grad()
def logp(model: Any, prompt: list[int], completion: list[int]) -> float:
    ids = torch.tensor([prompt + completion])
    scores = model(ids).logits[0, :-1].log_softmax(-1)
    return float(scores.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum())


def test_values_are_those_of_plain_loops(tiny_model: Path, thumbs_file: Path, tmp_path: Path) -> None:
    evaluation = Evaluation(
        str(thumbs_file), verifier=is_odd, text=str(thumbs_file), limit=13, max_new_tokens=9, batch_size=4
    )
    module, logged = fit(evaluation, tiny_model, thumbs_file, tmp_path)
    assert module.policy is not None
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    rows = [json.loads(line) for line in thumbs_file.read_text().splitlines()]
    byte_ids = evaluation._read_with.tokenizer  # type: ignore[union-attr]
    kl, tokens, right = 0.0, 0, 0
    assert len(evaluation.after) == 13
    prompts = [byte_ids.encode(row["prompt"], add_special_tokens=False) for row in rows[:13]]
    assert [x.tokens.tolist() for x in evaluation.prompts] == prompts
    drawn = sample(
        module.policy.lm, [x.tokens for x in evaluation.prompts], evaluation.how, eos_token_id=2, pad_token_id=0
    )
    for row, prompt, completion, said in zip(rows, prompts, drawn, evaluation.after, strict=False):
        ratio = logp(module.policy.lm, prompt, completion.tolist()) - logp(reference, prompt, completion.tolist())
        assert said.logratio == pytest.approx(ratio, abs=1e-9)
        assert said.completion == byte_ids.decode(completion, skip_special_tokens=True)
        kl, tokens, right = kl + ratio, tokens + len(completion), right + is_odd(row, said.completion)
    assert 0 < right < 13
    assert logged["samples/kl"] == pytest.approx(kl / 13, rel=1e-5)
    assert logged["samples/kl_token"] == pytest.approx(kl / tokens, rel=1e-5)
    assert logged["samples/verified"] == pytest.approx(right / 13, rel=1e-6)
    assert logged["samples/tokens"] == pytest.approx(tokens / 13, rel=1e-6)
    desirable = [row for row in rows if row["label"]][:13]
    nll, count = 0.0, 0
    for row in desirable:
        ids = [*byte_ids.encode(row["completion"], add_special_tokens=False), 2]
        nll -= logp(module.policy.lm, byte_ids.encode(row["prompt"], add_special_tokens=False), ids)
        count += len(ids)
    assert logged["text/nll"] == pytest.approx(nll / count, rel=1e-6)
    assert set(logged) == set(SAMPLED)


def test_before_is_the_start_and_training_is_left_alone(tiny_model: Path, thumbs_file: Path, tmp_path: Path) -> None:
    watched = Evaluation(str(thumbs_file), limit=6, max_new_tokens=8)
    module, logged = fit(watched, tiny_model, thumbs_file, tmp_path)
    blind, nothing = fit(Evaluation(), tiny_model, thumbs_file, tmp_path)
    assert nothing == {}
    for ours, other in zip(module.parameters(), blind.parameters(), strict=True):
        assert torch.equal(ours, other), "sampling changed the training"
    assert all(x.logratio == 0 for x in watched.before)
    assert all(x.logratio != 0 for x in watched.after)
    assert "samples/verified" not in logged
    stored = json.loads(json.dumps(watched.state_dict()))
    same, fewer, other_seed = (
        Evaluation(str(thumbs_file), max_new_tokens=8, limit=limit, seed=seed)
        for limit, seed in ((6, 0), (5, 0), (6, 1))
    )
    for evaluation in (same, fewer, other_seed):
        evaluation.prompts = watched.prompts[: evaluation.limit]
        evaluation.load_state_dict(stored)
    assert same.before == watched.before
    assert fewer.before == other_seed.before == [], "samples of others do not stand beside these"


def test_a_validation_is_not_the_state_before_training(
    tiny_model: Path, thumbs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = Evaluation(str(thumbs_file), limit=3, max_new_tokens=4)
    module = AlignmentModule(policy=str(tiny_model))
    data = AlignmentData(validation=str(thumbs_file))
    trainer = L.Trainer(accelerator="cpu", callbacks=[evaluation], logger=False, limit_val_batches=1)
    trainer.validate(module, datamodule=data, verbose=False)
    assert evaluation.before == []
    assert len(evaluation.after) == 3
    out = capsys.readouterr().out
    assert "completion" in out
    assert "before" not in out


def test_without_a_reference_there_is_no_kl(tiny_model: Path, thumbs_file: Path, tmp_path: Path) -> None:
    _, logged = fit(Evaluation(str(thumbs_file), limit=3, max_new_tokens=4), tiny_model, thumbs_file, tmp_path, SFT())
    assert {"samples/kl", "samples/kl_token"}.isdisjoint(logged)
    assert "samples/distinct" in logged


def test_summary_by_hand() -> None:
    said = [
        Said(0, "a", True, 1.0, 3, True),
        Said(1, "a", False, 2.0, 5, True),
        Said(2, "b", True, -0.5, 2, False),
        Said(3, "c", True, 0.5, 2, True),
    ]
    values = summary(said)
    assert values.pop("samples/verified_low") < 0.75 < values.pop("samples/verified_high")
    assert values == {
        "samples/verified": 0.75,
        "samples/kl": 0.75,
        "samples/kl_token": 0.25,
        "samples/distinct": 0.75,
        "samples/ended": 0.75,
        "samples/tokens": 3.0,
    }
    assert summary([]) == {}


def test_the_table_shows_what_was_said_and_reads_nothing_as_markup(
    tiny_model: Path, thumbs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    evaluation = Evaluation(str(thumbs_file), verifier=is_odd, limit=3, max_new_tokens=4, shown=2)
    assert evaluation.table() is None
    fit(evaluation, tiny_model, thumbs_file, tmp_path)
    evaluation.after[0] = Said(0, "[red]an e[/red]", True, 0.1, 4, True)
    table = evaluation.table()
    assert table is not None
    assert table.row_count == 2
    Console(width=120).print(table)
    assert "[red]an e[/red] ✓" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"completion": "a"}', "prompts.jsonl:1: prompt: missing"),
        ('{"prompt": [{"role": "user", "content": "a"}]}', "the tokenizer has no chat template"),
        ('{"prompt": ', "prompts.jsonl:1: column"),
        (json.dumps({"prompt": "a" * 125}), "the longest prompt has 125 tokens or more, which with max_new_tokens 8"),
    ],
)
def test_bad_prompts_are_refused_before_training(
    row: str, told: str, tiny_model: Path, thumbs_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(row + "\n")
    with pytest.raises(DataError, match=told):
        fit(Evaluation(str(file), max_new_tokens=8), tiny_model, thumbs_file, tmp_path)


def test_rows_without_a_prompt_can_be_skipped(tiny_model: Path, thumbs_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a:"}\n{"completion": "b"}\nno JSON\n{"messages": [{"role": "user"}]}\n{"prompt": "c:"}\n'
    )
    data = AlignmentData(validation=str(thumbs_file), on_bad_row="skip")
    data.needs = AlignmentModule(policy=str(tiny_model)).data_needs
    data.setup("validate")
    evaluation = Evaluation(str(file), text=str(file.with_name("text.jsonl")), max_new_tokens=4)
    file.with_name("text.jsonl").write_text('{"prompt": "a:"}\n{"prompt": "a:", "completion": " b"}\n')
    evaluation.read(data)
    assert [x.text for x in evaluation.prompts] == ["a:", "c:"]
    assert len(evaluation.text) == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"verifier": is_odd}, "no use without evaluation.prompts"),
        ({"split": "test"}, "no use without evaluation.prompts"),
        ({"prompts": "x", "limit": 0}, "limit must be at least 1"),
        ({"prompts": "x", "shown": -1}, "shown must be at least 0"),
        ({"prompts": "x", "top_p": 2.0}, "top_p"),
    ],
)
def test_values_out_of_range(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Evaluation(**wrong)
