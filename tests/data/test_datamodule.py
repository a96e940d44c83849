"""From files to batches: views, y′, splits, order, and every complaint about the data.

The file is long because every complaint about data is one case of the same set-up.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halos_pl.batch import Batch, DataNeeds, PairedBatch, SFTBatch, UnpairedBatch, View
from halos_pl.data import AlignmentData, DataError, DataWarning
from halos_pl.data.dataset import FeedbackDataset


def setup(
    model: Path, stage: str = "fit", view: View = "unpaired", mismatched: bool = True, vocab: int = 260, **options: Any
) -> AlignmentData:
    data = AlignmentData(**options)
    data.needs = DataNeeds(view, mismatched, str(model), vocab, 128)
    data.setup(stage)
    return data


def write(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def batches(data: AlignmentData) -> list[Batch]:
    return list(data.train_dataloader())


def text(data: AlignmentData, batch: Batch) -> list[str]:
    assert data.encoder is not None
    rows = batch.completions.targets.tensor_split(batch.completions.cu_seqlens[1:-1])
    return [data.encoder.tokenizer.decode(row) for row in rows]


# ---------------------------------------------------------------------------------------------------- views


def test_pairs_become_two_labelled_completions(tiny_model: Path, pairs_file: Path) -> None:
    data = setup(tiny_model, train=str(pairs_file), batch_size=16)
    dataset = data.datasets["train"]
    assert len(dataset) == 192
    assert dataset.labels.sum() == 96
    assert all(isinstance(batch, UnpairedBatch) for batch in batches(data))


def test_one_member_a_pair(tiny_model: Path, pairs_file: Path) -> None:
    data = setup(tiny_model, train=str(pairs_file), unpair="one", seed=1)
    dataset = data.datasets["train"]
    assert len(dataset) == 96
    assert 30 < dataset.labels.sum() < 66
    again = setup(tiny_model, train=str(pairs_file), unpair="one", seed=1).datasets["train"]
    other = setup(tiny_model, train=str(pairs_file), unpair="one", seed=2).datasets["train"]
    assert (dataset.labels == again.labels).all()
    assert (dataset.labels != other.labels).any()


def test_batches_mix_the_classes(tiny_model: Path, pairs_file: Path) -> None:
    """Rows that come as blocks of chosen and rejected must not leave in blocks (as TRL's do)."""
    data = setup(tiny_model, train=str(pairs_file), batch_size=8)
    single = [batch for batch in batches(data) if batch.desirable.float().mean() in (0, 1)]  # type: ignore[attr-defined]
    assert len(single) <= 2, "of 24 batches of 8, chance makes 0.2"


def test_stratified_batches_hold_equal_halves(tiny_model: Path, thumbs_file: Path, tmp_path: Path) -> None:
    data = setup(tiny_model, train=str(thumbs_file), batch_size=8, sampler="stratified")
    shares = {float(batch.desirable.float().mean()) for batch in batches(data)}  # type: ignore[attr-defined]
    assert shares == {0.5}
    one_class = tmp_path / "one.jsonl"
    one_class.write_text("".join(x + "\n" for x in thumbs_file.read_text().splitlines() if '"label": true' in x))
    with pytest.raises(DataError, match=r"no row is left to train on.*both classes"), pytest.warns(DataWarning):
        setup(tiny_model, train=str(one_class), sampler="stratified").train_dataloader()


@pytest.mark.parametrize(
    ("view", "options"),
    [
        ("sft", {"sampler": "stratified"}),
        ("paired", {"sampler": "stratified"}),
        ("paired", {"unpair": "one"}),
        ("paired", {"mismatch": "batch"}),
        ("sft", {"shuffle_labels": True}),
    ],
)
def test_options_without_a_use_are_refused(
    view: View, options: dict[str, Any], tiny_model: Path, pairs_file: Path
) -> None:
    with pytest.raises(DataError, match=f"data.{next(iter(options))}.*has no use for it"):
        setup(tiny_model, view=view, mismatched=False, train=str(pairs_file), **options)


@pytest.mark.parametrize("options", [{"sampler": "startified"}, {"unpair": "all"}, {"mismatch": "none"}])
def test_misspelt_choices_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        AlignmentData(**options)


def test_another_module_is_asked_anew(tiny_model: Path, thumbs_file: Path) -> None:
    data = setup(tiny_model, train=str(thumbs_file))
    assert len(data.datasets["train"]) == 96
    data.needs = DataNeeds("sft", False, str(tiny_model), 260, 128)
    data.setup("fit")
    assert len(data.datasets["train"]) == 64, "SFT must not imitate what is undesirable"


def test_a_reference_with_another_vocabulary_is_refused(tiny_model: Path, thumbs_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    data = AlignmentData(train=str(thumbs_file))
    data.needs = DataNeeds("unpaired", True, str(tiny_model), 260, 128, reference=str(other))
    data.setup("fit")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"<unk>": 3', '"<odd>": 3').replace("<unk>", "<odd>"))
    data = AlignmentData(train=str(thumbs_file))
    data.needs = DataNeeds("unpaired", True, str(tiny_model), 260, 128, reference=str(other))
    with pytest.raises(DataError, match="has another vocabulary"):
        data.setup("fit")


def test_prediction_needs_no_mismatched_rows(tiny_model: Path, tmp_path: Path) -> None:
    data = setup(tiny_model, "predict", test=write(tmp_path / "f.jsonl", [GOOD]))
    (batch,) = data.predict_dataloader()
    assert batch.mismatched is None


def test_batch_pairing_leaves_no_batch_of_one(tiny_model: Path, thumbs_file: Path) -> None:
    data = setup(tiny_model, train=str(thumbs_file), validation=str(thumbs_file), batch_size=5, mismatch="batch")
    assert [batch.num_examples for batch in batches(data)] == [5] * 19
    assert data.datasets["train"].partners is None
    assert data.datasets["validation"].partners is not None, "held-out figures depend on no batch"


def test_dpo_and_sft_views(tiny_model: Path, pairs_file: Path, thumbs_file: Path) -> None:
    pairs = setup(tiny_model, view="paired", mismatched=False, train=str(pairs_file), batch_size=4)
    assert isinstance(batches(pairs)[0], PairedBatch)
    assert batches(pairs)[0].mismatched is None
    demonstrations = setup(tiny_model, view="sft", mismatched=False, train=str(thumbs_file), batch_size=4)
    assert isinstance(batches(demonstrations)[0], SFTBatch)
    assert len(demonstrations.datasets["train"]) == 64, "the undesirable ones are not imitated"
    with pytest.raises(DataError, match=r"thumbs\.jsonl:1: chosen: missing"):
        setup(tiny_model, view="paired", train=str(thumbs_file))


def test_held_out_pairs_stay_pairs_for_kto(tiny_model: Path, pairs_file: Path) -> None:
    data = setup(tiny_model, train=str(pairs_file), validation=str(pairs_file), eval_batch_size=5)
    batch = next(iter(data.val_dataloader()))
    assert isinstance(batch, PairedBatch)
    assert batch.num_examples == 5
    assert batch.mismatched is not None
    assert batch.mismatched.num_rows == 10


# ------------------------------------------------------------------------------------------------- y′, order


def partners(dataset: FeedbackDataset) -> list[tuple[bytes, bytes]]:
    assert dataset.partners is not None
    return [
        (x.prompt_key, dataset.example(j).prompt_key) for x, j in zip(dataset.examples(), dataset.partners, strict=True)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_mismatched_completions_come_from_other_prompts(seed: int, tiny_model: Path, pairs_file: Path) -> None:
    """The two members of a pair share their prompt: y′ = rejected for x's chosen would be no mismatch."""
    dataset = setup(tiny_model, train=str(pairs_file), seed=seed).datasets["train"]
    assert all(own != other for own, other in partners(dataset))
    assert dataset.partners is not None
    for example, j in zip(dataset.examples(), dataset.partners, strict=True):
        assert example.completion_key != dataset.example(j).completion_key


def test_dataset_pairing_depends_on_nothing_but_rows_and_seed(tiny_model: Path, thumbs_file: Path) -> None:
    def served(**options: Any) -> dict[str, str]:
        data = setup(tiny_model, train=str(thumbs_file), **options)
        assert data.encoder is not None
        decode = data.encoder.tokenizer.decode
        dataset = data.datasets["train"]
        return {str(dataset[i].examples[0].origin): decode(dataset[i].mismatched[0]) for i in range(len(dataset))}  # type: ignore[index]

    assert served(batch_size=1) == served(batch_size=32, num_workers=2, sampler="stratified")
    assert served(seed=1) != served(seed=2)


def test_workers_change_nothing(tiny_model: Path, thumbs_file: Path) -> None:
    seen = []
    for workers in (0, 2):
        data = setup(tiny_model, train=str(thumbs_file), batch_size=7, num_workers=workers)
        seen.append([text(data, batch) for batch in batches(data)])
    assert seen[0] == seen[1]


def test_the_last_small_batch_is_kept(tiny_model: Path, thumbs_file: Path) -> None:
    data = setup(tiny_model, train=str(thumbs_file), batch_size=7)
    assert sum(batch.num_examples for batch in batches(data)) == 96


def test_shuffled_labels_keep_their_number(tiny_model: Path, thumbs_file: Path, pairs_file: Path) -> None:
    plain, control = (
        setup(tiny_model, train=str(thumbs_file), validation=str(thumbs_file), shuffle_labels=flag)
        for flag in (False, True)
    )
    assert plain.datasets["train"].labels.sum() == control.datasets["train"].labels.sum()
    agree = (plain.datasets["train"].labels == control.datasets["train"].labels).mean()
    assert 0.4 < agree < 0.75, "two thirds are desirable: chance agrees on 5 of 9"
    assert (plain.datasets["validation"].labels == control.datasets["validation"].labels).all()

    keys = [
        [
            x.completion.tolist()
            for x in setup(tiny_model, view="paired", mismatched=False, train=str(pairs_file), shuffle_labels=flag)
            .datasets["train"]
            .examples()
        ]
        for flag in (False, True)
    ]
    swapped = np.mean([a != b for a, b in zip(keys[0][::2], keys[1][::2], strict=True)])
    assert swapped == 0.5


# --------------------------------------------------------------------------------------------------- complaints

GOOD = {"prompt": "a", "completion": " b", "label": True}
OTHER = {"prompt": "c", "completion": " d", "label": False}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "a", ', r"f\.jsonl:2.*JSON"),
        ({"prompt": "a", "label": True}, r"f\.jsonl:2: completion: missing"),
        ({"prompt": "a", "completion": " b", "label": "so-so"}, r"f\.jsonl:2: label: got 'so-so'.*true"),
        ({"prompt": "a", "completion": "", "label": True}, r"f\.jsonl:2: completion: an empty completion"),
        ({"prompt": "a\0", "completion": " b", "label": True}, r"f\.jsonl:2: prompt: a null byte at character 1"),
        (
            {"prompt": [{"role": "human", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            r"f\.jsonl:2: prompt\[0\]\.role: unknown role 'human'",
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
            | {"label": True},
            r"f\.jsonl:2.*no chat template.*--data\.chat_template",
        ),
    ],
)
def test_bad_rows_are_named_or_skipped(bad: object, message: str, tiny_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", [GOOD, bad, OTHER])
    with pytest.raises(DataError, match=message):
        setup(tiny_model, train=file)
    data = setup(tiny_model, train=file, on_bad_row="skip")
    assert len(data.datasets["train"]) == 2
    assert "skipped" in data.datasets["train"].report
    assert "f.jsonl:2" in data.datasets["train"].report


def test_a_row_of_another_view_is_a_bad_row_too(tiny_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", [GOOD, {"prompt": "a", "completion": " e"}, OTHER])
    with pytest.raises(DataError, match=r"f\.jsonl:2: label: missing"):
        setup(tiny_model, train=file)
    assert len(setup(tiny_model, train=file, on_bad_row="skip").datasets["train"]) == 2
    scored = setup(tiny_model, "predict", test=file).datasets["predict"]
    assert len(scored) == 3, "scoring needs no label"


def test_ten_bad_rows_are_told_at_once(tiny_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", [GOOD | {"label": "x"}] * 12)
    with pytest.raises(DataError) as error:
        setup(tiny_model, train=file)
    assert "f.jsonl:1: label: got 'x'" in str(error.value)
    assert "9 more like it: rows 2, 3, 4, 5, 6, 7, 8, 9, 10)" in str(error.value)
    assert "--data.on_bad_row skip" in str(error.value)


def test_an_empty_file(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train: .*f\.jsonl: no rows"):
        setup(tiny_model, train=write(tmp_path / "f.jsonl", []))


def test_one_class_trains_with_a_warning(tiny_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", [GOOD, OTHER | {"label": True}])
    with pytest.warns(DataWarning, match="all 2 rows are desirable"):
        data = setup(tiny_model, train=file)
    assert len(batches(data)) == 1


def test_one_prompt_cannot_be_mismatched(tiny_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", [GOOD, GOOD | {"completion": " e", "label": False}])
    with pytest.raises(DataError, match=r"f\.jsonl:\d: no other row has another prompt.*reference_point false"):
        setup(tiny_model, train=file)
    assert len(setup(tiny_model, mismatched=False, train=file).datasets["train"]) == 2


def test_a_huge_row_is_cut_with_a_warning(tiny_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", [GOOD, OTHER | {"completion": " ab" * 700_000}])
    with pytest.warns(DataWarning, match=r"f\.jsonl:2: completion: 2,100,000 characters"):
        data = setup(tiny_model, train=file)
    assert "1 of 2 rows were truncated" in data.datasets["train"].report
    assert max(len(x.prompt) + len(x.completion) for x in data.datasets["train"].examples()) == 128


def test_maximum_length_below_the_prompt(tiny_model: Path, tmp_path: Path) -> None:
    """The prompt gives way to the completion's start; nothing is dropped in silence."""
    file = write(tmp_path / "f.jsonl", [{"prompt": "p" * 50, "completion": " wxyz" * 9, "label": True}, OTHER])
    data = setup(tiny_model, train=file, max_length=20)
    assert "1 of 2 rows were truncated (1 prompts cut on the left, 1 completions cut at the end)" in (
        data.datasets["train"].report
    )
    cut = data.datasets["train"].example(0)
    assert data.encoder is not None
    assert len(cut.prompt) + len(cut.completion) == 20
    assert data.encoder.tokenizer.decode(cut.completion) == " wxyz wxyz"


def test_the_models_positions_bound_the_length(tiny_model: Path, tmp_path: Path) -> None:
    data = setup(tiny_model, train=write(tmp_path / "f.jsonl", [GOOD, OTHER]), max_length=4096)
    assert data.encoder is not None
    assert data.encoder.max_length == 128


def test_a_tokenizer_larger_than_the_head(tiny_model: Path, thumbs_file: Path) -> None:
    with pytest.raises(DataError, match="has 260 tokens, more than the 100 rows of the model's head"):
        setup(tiny_model, vocab=100, train=str(thumbs_file))


def test_a_model_folder_without_tokenizer(tiny_model: Path, thumbs_file: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    with pytest.raises(ValueError, match="no tokenizer"):
        setup(tmp_path, train=str(thumbs_file))


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_stage_without_data_says_which_option(stage: str, tiny_model: Path) -> None:
    with pytest.raises(DataError, match=r"`\w+` needs data: give `--data\.(train|validation|test) FILE`"):
        setup(tiny_model, stage)


@pytest.mark.parametrize("option", ["batch_size", "eval_batch_size", "pad_to_multiple_of", "length_groups"])
def test_sizes_must_be_positive(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        AlignmentData(**{option: 0})  # type: ignore[arg-type]
