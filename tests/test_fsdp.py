"""The strategy `fsdp` on two ranks against one process: of plain transformers code, and of our own. One launch for all
tests that are not slow.

The file is long because the truth of a case, and what two ranks found in it, serve every test.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedModel

from halos_pl.__main__ import main
from halos_pl.checkpoints import open_checkpoint
from halos_pl.data.loader import LoaderOptions, make_loader
from halos_pl.fsdp import refuse_others

WORKER = Path(__file__).with_name("fsdp_worker.py")
WORK = runpy.run_path(str(WORKER))
PLAIN = runpy.run_path(str(WORKER.with_name("plain_hf.py")))
CASES, STEPS, LR = WORK["CASES"], WORK["STEPS"], WORK["LR"]
EXACT = 1e-9  # float64
Results = dict[str, Any]
Ranks = tuple[Results, ...]
Files = dict[str, str]


def scattered(model: PreTrainedModel, seed: int, scale: float) -> PreTrainedModel:
    """Random weights of which every part shows."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = p.ndim == 1 and name.endswith("weight")
            p.copy_(torch.from_numpy(rng.normal(0, scale, p.shape) + norm))
    return model


@pytest.fixture(scope="module")
def files(
    tiny_model: Path, pairs_file: Path, thumbs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Models whose dimensions no number of ranks divides; the reference is the less likely to say anything."""
    home = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    size: dict[str, Any] = {"vocab_size": 261, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = size | {"n_positions": 128, "n_embd": 18, "n_inner": 37, "n_layer": 2, "n_head": 2}
    llama = size | {"hidden_size": 18, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 1}
    configs = {
        "tied": GPT2Config(**gpt2),
        "untied": GPT2Config(**gpt2, tie_word_embeddings=False),
        "other": GPT2Config(**gpt2, tie_word_embeddings=False),
        "llama": LlamaConfig(**llama, tie_word_embeddings=True),
    }
    for seed, (name, config) in enumerate(configs.items()):
        model = scattered(AutoModelForCausalLM.from_config(config), seed, 0.3 if name == "other" else 0.15)
        if name == "untied":
            model.config.tie_word_embeddings = True  # what other tools leave behind: the weights say otherwise
            model.save_pretrained(home / "parted")
            model.config.tie_word_embeddings = False
            tokenizer.save_pretrained(home / "parted")
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    models = {name: str(home / name) for name in (*configs, "parted")}
    return models | {"pairs": str(pairs_file), "thumbs": str(thumbs_file)}


def launch(ranks: int, files: Files, out: Path, *wanted: str, timeout: int = 240) -> Ranks:
    """What each rank found."""
    (out / "files.json").write_text(json.dumps(files))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*start, str(WORKER), str(out / "files.json"), str(out), *wanted],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return tuple(torch.load(out / f"rank{r}.pt", weights_only=True) for r in range(ranks))


@pytest.fixture(scope="module")
def ranks(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    parts = [name for name in WORK["PARTS"] if name != "of_one"]
    return launch(2, files, tmp_path_factory.mktemp("ranks"), "cases", *parts)


# ---------------------------------------------------------------------------------------------- the truth


def steps_of(case: Any, files: Files, world: int) -> list[list[Any]]:
    """The micro-batches of each optimizer step, of the rows that each rank's sampler names."""
    module, data = WORK["make"](case, files)
    data.needs = module.data_needs
    data.setup("fit")
    rows = data.datasets["train"]
    options = LoaderOptions(case.batch, None, False, False, False, False, 1, 1, 0, data.seed)
    samplers = [
        make_loader(
            rows, data.preparation.encoder, module.data_needs, options, stage="train", world=world, rank=rank
        ).sampler
        for rank in range(world)
    ]
    steps: list[list[Any]] = []
    epoch = 0
    while len(steps) < STEPS:
        count = len(samplers[0]) if case.limit == 1.0 else case.limit
        micros = [PLAIN["micro_batch"]([rows[s.at(epoch, k)] for s in samplers]) for k in range(count)]
        steps += [micros[k : k + case.accumulate] for k in range(0, count, case.accumulate)]
        epoch += 1
    return steps[:STEPS]


Truth = Callable[[Any, int], tuple[list[list[Any]], Results]]


@pytest.fixture(scope="module")
def truth(files: Files) -> Truth:
    """Micro-batches, and what plain code makes of them, of a case; computed once."""
    known: dict[Any, tuple[list[list[Any]], Results]] = {}

    def compute(case: Any, world: int = 2) -> tuple[list[list[Any]], Results]:
        same = case._replace(checkpointing=False, reduce="step", length_groups=1, replicas=1, between=False)
        if (key := (same, world)) not in known:
            steps = steps_of(case, files, world)
            policy = files[case.model]
            reference = policy if case.reference == "copy" else files["other"]
            known[key] = steps, PLAIN["train"](case, policy, reference, steps, LR)
        return known[key]

    return compute


def off(found: Results, expected: Results) -> dict[str, float]:
    """How far a run is from the truth, by what is compared: largest difference."""
    rows = found["rows"]
    steps = len(rows)
    out = {"loss": difference([row["train/loss"] for row in rows], expected["loss"][:steps])}
    out["norm"] = difference([row["train/grad_norm"] for row in rows], expected["norm"][:steps])
    if expected["z0"][0] is not None:
        out["z0"] = difference(found["z0"], expected["z0"][: len(found["z0"])])
    if steps == STEPS:
        names = set(expected["parameters"])
        assert set(found["parameters"]) == names
        assert len(found["z0"]) == len(expected["z0"])
        out["parameters"] = max(difference(found["parameters"][name], expected["parameters"][name]) for name in names)
    out["grads"] = 0.0
    for ours, theirs in zip(found["grads"], expected["grads"][:steps], strict=True):
        each = [difference(ours[name], theirs[name]) if name in ours else math.inf for name in theirs]
        out["grads"] = max(out["grads"], *each)
    return out


def joined(ranks: Ranks, *keys: str, replicas: int = 1) -> Results:
    """What the first rank found, with gradients of the rows of all; each copy of them must be the same."""
    found = [rank[keys[0]][keys[1]] for rank in ranks]
    size = len(ranks) // replicas
    copies = [
        [
            {name: torch.cat([rank["grads"][k][name] for rank in found[at : at + size]]) for name in grads}
            for k, grads in enumerate(found[at]["grads"])
        ]
        for at in range(0, len(ranks), size)
    ]
    for copy in copies[1:]:
        torch.testing.assert_close(copy, copies[0], atol=0, rtol=0)
    return found[0] | {"grads": copies[0]}


def difference(found: Any, expected: Any) -> float:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_compute_what_plain_code_does(name: str, ranks: Ranks, truth: Truth) -> None:
    steps, expected = truth(CASES[name], 2)
    found = joined(ranks, "cases", name)
    assert len(found["rows"]) == STEPS
    for rank in ranks:
        assert max(off(rank["cases"][name] | {"grads": found["grads"]}, expected).values()) <= EXACT
    moved = {key: difference(grad, expected["grads"][0][key]) for key, grad in expected["grads"][-1].items()}
    still = [key for key, value in moved.items() if not value]
    assert len(still) <= (1 if CASES[name].clip_by == "value" else 0), "a gradient that stays the same tests nothing"
    if "kto" in name and CASES[name].reference == "other" and not CASES[name].lora:
        assert np.median(expected["z0"]) > 0.5, "a z0 of 0 would hide whose rows it is of"
    assert_uneven(name, steps)


def assert_uneven(name: str, steps: list[list[Any]]) -> None:
    """The rows of the ranks are such that wrong means show."""
    micros = [micro for step in steps for micro in step]
    held = [[micro.of_rank.count(rank) for rank in (0, 1)] for micro in micros]
    tokens = [
        [sum(len(y) for (_, y), r in zip(m.rows, m.of_rank, strict=True) if r == k) for k in (0, 1)] for m in micros
    ]
    assert any(a != b for a, b in tokens)
    if name == "kto, one class a rank":
        one = [m for m in micros if len({*zip(m.of_rank, m.desirable, strict=True)}) == 2 == len(set(m.desirable))]
        assert one, "one rank with desirable rows alone, the other with undesirable ones"
    elif name != "kto, limited":
        assert any(a != b for a, b in held)
    if "accumulated" in name:
        assert len({len(step) for step in steps}) == 2, "an accumulation that the epoch's end cuts short"


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_log_what_one_process_logs(name: str, ranks: Ranks, files: Files) -> None:
    alone = WORK["train"](CASES[name], files, 2, alone=True)
    for rank in ranks:
        together = rank["cases"][name]
        assert len(together["rows"]) == len(alone["rows"]) == STEPS
        for ours, theirs in zip(together["rows"], alone["rows"], strict=True):
            assert without_rate(ours) == pytest.approx(without_rate(theirs), abs=EXACT, rel=0)
        if CASES[name].held_out:
            assert together["held_out"] == pytest.approx(alone["held_out"], abs=EXACT, rel=0)
            assert {"val/samples/distinct", "val/text/nll"} <= set(alone["held_out"])
            assert len(together["said"]) == 7
            for ours, theirs in zip(together["said"], alone["said"], strict=True):
                assert ours[:2] == theirs[:2], "prompt and completion"
                assert ours[2] == pytest.approx(theirs[2], abs=EXACT)


def without_rate(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "train/tokens_per_second"}


@pytest.mark.parametrize("name", WORK["CONTROLS"])
def test_broken_code_is_found_out(name: str, ranks: Ranks, truth: Truth) -> None:
    what, case, _ = WORK["CONTROLS"][name]
    _, expected = truth(CASES[case], 2)
    found = ranks[0]["controls"][name] if name == "nothing sharded" else joined(ranks, "controls", name)
    assert off(found, expected)[what] > 1e-4, "what the other tests allow is 1e-9"


# ---------------------------------------------------------------------------------------------- what a rank holds


def test_a_rank_holds_half_of_both_models(ranks: Ranks) -> None:
    for name in ("kto", "dpo"):
        for model in ("policy", "reference"):
            (first, whole), (second, _) = (rank["cases"][name]["shares"][model] for rank in ranks)
            assert first + second == whole
            assert second > 0.45 * whole
            here, everything = ranks[0]["controls"]["nothing sharded"]["shares"][model]
            assert here == everything, "else this test sees nothing"


def test_all_units_are_sharded_again_after_a_step_and_the_reference_is_frozen(ranks: Ranks) -> None:
    for rank in ranks:
        for name, found in rank["cases"].items():
            assert found["frozen"], name
            assert found["sharded after each step"]
            assert all(found["sharded after each step"]), name
    assert not any(ranks[0]["controls"]["root kept whole"]["sharded after each step"]), "else this test sees nothing"


def test_ranks_call_equally_many_collectives(ranks: Ranks) -> None:
    for name in CASES:
        assert ranks[0]["cases"][name]["counts"] == ranks[1]["cases"][name]["counts"]


def test_gradients_are_reduced_once_a_step_or_with_every_micro_batch(ranks: Ranks, truth: Truth) -> None:
    for name, micro_batches in {
        "kto, untied, accumulated": STEPS,
        "kto, accumulated, reduced at once": sum(map(len, truth(CASES["kto, untied, accumulated"], 2)[0])),
    }.items():
        assert ranks[0]["cases"][name]["counts"]["scatters"] == 3 * micro_batches, "two layers and the root"


# ---------------------------------------------------------------------------------------------- other parts


@pytest.mark.parametrize("kind", ["tied", "untied", "llama", "parted"])
def test_the_first_rank_gives_its_weights_to_the_others(kind: str, ranks: Ranks, files: Files) -> None:
    lm = AutoModelForCausalLM.from_pretrained(files[kind], dtype=torch.float64)
    expected = dict([*lm.named_parameters(), *lm.named_buffers()])
    assert (lm.lm_head.weight is lm.get_input_embeddings().weight) == (kind in ("tied", "llama"))
    assert any("inv_freq" in name for name in expected) == (kind == "llama")
    for rank in ranks:
        found = rank["filled"][kind]
        assert found["tied"] == (kind in ("tied", "llama"))
        assert not found["meta"]
        for model in ("policy", "reference"):
            own = {name: x for name, x in found[model].items() if not name.startswith("value_head.")}
            assert set(own) == set(expected)
            assert all(torch.equal(own[name], expected[name]) for name in own)


def test_one_rank_s_error_is_that_of_all(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["errors"] == {"the first": "ModelError: the first cannot", "another": "ModelError: another cannot"}


def test_mixed_precision_is_near_the_truth_and_others_are_refused(ranks: Ranks, truth: Truth) -> None:
    _, expected = truth(CASES["kto"], 2)
    for rank in ranks:
        found = rank["precisions"]
        losses = [row["train/loss"] for row in found["bf16-mixed"]]
        assert losses == pytest.approx(expected["loss"][:2], abs=1e-2)
        assert difference(losses, expected["loss"][:2]) > 1e-6, "not mixed"
        refused = found["refused"]
        assert refused["bf16-true"].startswith("ModelError: --trainer.precision bf16-true would also cast")
        assert refused["bf16-mixed of bfloat16"].startswith("ModelError: --trainer.precision bf16-mixed mixes with")
        assert "precision='16-mixed'" in refused["16-mixed"]
        assert "precision='64-true'" in refused["64-true"]


def test_validation_before_any_training_changes_nothing(ranks: Ranks, truth: Truth, files: Files) -> None:
    _, expected = truth(CASES["kto"], 2)
    module, data = WORK["make"](CASES["kto"], files, 2)
    trainer = WORK["make_trainer"](CASES["kto"], 0, WORK["Record"](), limit_val_batches=1.0)
    (alone,) = trainer.validate(module, datamodule=data, verbose=False)
    for rank in ranks:
        found = rank["validated_first"]
        assert found["before"] == pytest.approx(alone, abs=EXACT, rel=0)
        for name, value in expected["parameters"].items():
            assert difference(found["parameters"][name], value) <= EXACT


def test_fewer_rows_than_ranks_is_one_error(ranks: Ranks) -> None:
    for rank in ranks:
        told = "no row is left to train on: 1 rows on 2 ranks; each rank needs one: use fewer devices"
        assert rank["few_rows"] == f"DataError: {told}"


@pytest.fixture
def alone_in_a_group() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone_in_a_group")
def test_one_device_computes_what_it_does_without_the_strategy(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.setenv(name, "")  # Lightning sets some of them: put back at the end
        monkeypatch.delenv(name)
    sharded, plain = (WORK["of_one"](files, world) for world in (1, 0))
    for name, found in sharded.items():
        assert all(found["sharded after each step"])
        assert not any(plain[name]["sharded after each step"])
        for ours, theirs in zip(found["rows"], plain[name]["rows"], strict=True):
            assert without_rate(ours) == pytest.approx(without_rate(theirs), abs=1e-12, rel=0)
        for key, value in plain[name]["parameters"].items():
            assert difference(found["parameters"][key], value) <= 1e-12
        assert found["held_out"] == pytest.approx(plain[name]["held_out"], abs=1e-12, rel=0)
        assert [x[:2] for x in found["said"]] == [x[:2] for x in plain[name]["said"]]


# ---------------------------------------------------------------------------------------------- long matrices


def compare_all(matrix: str, found: Ranks, truth: Truth) -> None:
    for name, case in WORK["MATRICES"][matrix].items():
        _, expected = truth(case, len(found))
        allowed = EXACT if case.dtype == "float64" else 2e-6 * expected["size"]
        grads = joined(found, matrix, name, replicas=case.replicas)["grads"]
        for rank in found:
            wrong = off(rank[matrix][name] | {"grads": grads}, expected)
            assert max(wrong.values()) <= allowed, f"{name}: {wrong}, allowed {allowed}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("matrix", "count"), [("float64", 2), ("float32", 2), ("replicas", 4)])
def test_everything_with_everything(matrix: str, count: int, files: Files, truth: Truth, tmp_path: Path) -> None:
    found = launch(count, files, tmp_path, matrix, timeout=800)
    compare_all(matrix, found, truth)
    for name in WORK["MATRICES"][matrix]:
        assert len({str(rank[matrix][name]["counts"]) for rank in found}) == 1, "calls of collectives"
    if matrix == "replicas":
        for name, parts in (("kto", 4), ("kto, two replicas", 2), ("sft, four replicas", 1)):
            for rank in found:
                here, whole = rank[matrix][name]["shares"]["policy"]
                assert here < 1.1 * whole / parts


# ---------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("name", ["fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3_offload", "model_parallel"])
def test_a_strategy_that_does_not_fit_is_one_message(
    name: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model.policy", files["tied"], "--data.train", files["thumbs"], "--trainer.strategy", name]
    monkeypatch.setattr(sys, "argv", ["halos_pl", "fit", *words])
    assert main() == 2
    told = capsys.readouterr().err
    assert f"--trainer.strategy {name} does not go with two models" in told
    assert "`fsdp`" in told
    assert "Traceback" not in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("strategy", [ModelParallelStrategy(), FSDPStrategy()])
def test_an_instance_that_does_not_fit_is_refused_before_models_are_loaded(strategy: Any, files: Files) -> None:
    module, _ = WORK["make"](CASES["kto"], files)
    module._trainer = SimpleNamespace(strategy=strategy, precision="32-true")
    with pytest.raises(ValueError, match=r"does not go with two models behind one loss: `fsdp` shards both"):
        module.setup("fit")


@pytest.mark.parametrize(
    "strategy", ["auto", "ddp", "ddp_spawn", "fsdp", "fsdp2", SingleDeviceStrategy(), DDPStrategy(), None]
)
def test_others_fit(strategy: Any) -> None:
    refuse_others(strategy)


@pytest.mark.gpu
def test_the_quickstart_on_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded over one device, with the Triton kernels, it learns what it learns without the strategy."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for name in ("auto", "fsdp"):
        words = ["--trainer.strategy", name, "--trainer.devices", "1", "--trainer.max_steps", "60"]
        assert main(["fit", "--config", "kto.yaml", "--name", name, *words]) == 0
        stored = open_checkpoint(tmp_path / "runs" / name / "checkpoints" / "last.ckpt").load()
        found[name] = stored["callbacks"]["RunReport"]["after"]
    assert found["fsdp"]["val/loss"] < 0.8
    assert found["fsdp"]["val/loss"] == pytest.approx(found["auto"]["val/loss"], rel=0.02)
