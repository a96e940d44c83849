"""What the objectives beside KTO, DPO and SFT leave behind a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halos_pl.__main__ import main

SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--evaluation.limit", "4"]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
PROMPT = [{"role": "user", "content": "Tell me a story about Mia the fox. Put some rain in it."}]


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr("sys.argv", ["halos_pl", *argv])
    return main(list(argv))


def test_an_export_of_csft_is_sampled_with_the_good_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "fit", "--config", "csft.yaml", "--name", "good", *SHORT, *QUIET) == 0
    exported = AutoTokenizer.from_pretrained("runs/good/policy")
    shipped = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "halos_pl" / "assets" / "nano")
    asked = [x.apply_chat_template(PROMPT, add_generation_prompt=True, tokenize=False) for x in (exported, shipped)]
    assert asked[0] == asked[1] + "<|good|>"
    told = [x.apply_chat_template(PROMPT, tokenize=False) for x in (exported, shipped)]
    assert told[0] == told[1], "only a generation prompt ends in it"
    again = ["--model.policy", "runs/good/policy", "--data.validation", "nano:thumbs-held-out"]
    assert run(monkeypatch, "validate", "--config", "csft.yaml", *again, *SHORT[2:], *QUIET) == 0


def test_predict_writes_the_reward_of_an_objective_without_a_reference(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model.policy", str(tiny_model), "--data.test", str(pairs_file), "--model.objective", "SimPO"]
    assert run(monkeypatch, "predict", *model, "--name", "scores", *QUIET) == 0
    rows = [json.loads(line) for line in Path("runs/scores/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 192
    for row in rows:
        assert row["reward"] == pytest.approx(2.0 * row["logp"] / row["length"], rel=1e-5)
        assert "logratio" not in row


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--config", "bco.yaml"), "balance: desirable rows weigh 1.00 times the undesirable ones"),
        (("--config", "bco.yaml", "--data.sampler", "shuffle"), "warning: desirable rows weigh 0.29 times"),
        (("--config", "kto.yaml"), "balance: desirable rows weigh 1.17 times the undesirable ones"),
    ],
)
def test_the_classes_weigh_what_an_epoch_shows(
    argv: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "fit", *argv, *QUIET, "--trainer.fast_dev_run", "true") == 0
    assert told in capsys.readouterr().out


def test_a_checkpoint_serves_another_objective_where_it_holds_what_that_needs(
    tiny_model: Path, thumbs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model.policy", str(tiny_model), "--data.validation", str(thumbs_file), *QUIET]
    one = ["--data.train", str(thumbs_file), "--trainer.max_steps", "1"]
    critic = ["--model.objective", "PPOOffline", "--model.objective.critic", "true"]
    assert run(monkeypatch, "fit", *critic, *one, "--name", "critic", *model) == 0
    trained = ["--ckpt_path", "runs/critic/checkpoints/last.ckpt"]
    assert run(monkeypatch, "validate", "--model.objective", "KTO", *trained, *model) == 0
    capsys.readouterr()
    assert run(monkeypatch, "validate", "--model.objective", "BCO", *trained, *model) == 2
    error = capsys.readouterr().err
    assert "of another objective: BCO needs its running_mean.total, running_mean.count" in error


def test_rows_as_they_lie_are_not_stratified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "fit", "--config", "kto-v1.yaml", "--trainer.overfit_batches", "2", *QUIET) == 2
    assert (
        "--trainer.overfit_batches: to train on the same few rows, --data.train.limit ROWS" in capsys.readouterr().err
    )
    assert not Path("runs").exists()
