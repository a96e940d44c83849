"""What an objective asks of its rows beyond the view: scores, equal halves, control; and shares of the rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from halos_pl.batch import Batch, DataNeeds, PairedBatch, UnpairedBatch, View
from halos_pl.data import AlignmentData, DataError, DataWarning

CONTROL = ("+", "-")


def setup(
    model: Path, stage: str = "fit", view: View = "unpaired", needs: dict[str, Any] | None = None, **options: Any
) -> AlignmentData:
    data = AlignmentData(**options)
    data.needs = DataNeeds(view, False, str(model), 260, 128, **(needs or {}))
    data.setup(stage)
    return data


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def thumbs(up: int, down: int) -> list[dict[str, Any]]:
    """Labels in blocks; scores beside them that are known by the completion."""
    labels = [True] * up + [False] * down
    return [
        {"prompt": f"p{i}", "completion": f" {i}", "label": label, "score": i - up + 0.5}
        for i, label in enumerate(labels)
    ]


def texts(data: AlignmentData, batch: Batch) -> list[str]:
    assert data.encoder is not None
    rows = batch.completions.targets.tensor_split(batch.completions.cu_seqlens[1:-1])
    return [data.encoder.tokenizer.decode(row) for row in rows]


def rows(data: AlignmentData, stage: Any = "train") -> list[str]:
    return [str(item.examples[0].origin).split(":")[-1] for item in data.datasets[stage]]


def unpaired(batches: Any) -> Iterator[UnpairedBatch]:
    for batch in batches:
        assert isinstance(batch, UnpairedBatch)
        yield batch


# ------------------------------------------------------------------------------------------------ control


def test_control_reaches_the_batches(tiny_model: Path, thumbs_file: Path) -> None:
    data = setup(tiny_model, needs={"control": CONTROL}, train=str(thumbs_file))
    assert data.encoder is not None
    for example in data.datasets["train"].examples():
        assert data.encoder.tokenizer.decode(example.prompt).endswith(":+" if example.desirable else ":-")
    asked = data.encoder.encode_prompt("a", origin=data.datasets["train"].example(0).origin)
    assert data.encoder.tokenizer.decode(asked) == "a+"


@pytest.mark.parametrize("unpair", ["both", "one"])
@pytest.mark.parametrize(("stage", "part"), [("validate", "validation"), ("test", "test"), ("predict", "test")])
def test_control_splits_held_out_pairs(stage: str, part: str, unpair: str, tiny_model: Path, pairs_file: Path) -> None:
    """Log-probabilities under different prompts are no preference; and no held-out completion is left out."""
    needs: dict[str, Any] = {"control": CONTROL}
    data = setup(tiny_model, stage, needs=needs, unpair=unpair, **{part: str(pairs_file)})  # type: ignore[arg-type]
    (dataset,) = data.datasets.values()
    assert len(dataset) == 192
    assert dataset.labels.sum() == 96
    assert not dataset.paired


# ------------------------------------------------------------------------------------------------- scores


def test_scores_are_read_where_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", [{k: x for k, x in row.items() if k != "label"} for row in thumbs(5, 7)])
    data = setup(tiny_model, needs={"scores": True}, train=file, validation=file, batch_size=4)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in unpaired(loader):
            assert batch.score is not None
            assert batch.score.tolist() == [float(x.removesuffix("</s>")) - 4.5 for x in texts(data, batch)]
            assert batch.desirable.tolist() == (batch.score > 0).tolist()
    plain = setup(tiny_model, train=write(tmp_path / "g.jsonl", thumbs(5, 7)))
    assert {batch.score for batch in unpaired(plain.train_dataloader())} == {None}


def test_rows_without_scores_are_listed(tiny_model: Path, tmp_path: Path, pairs_file: Path) -> None:
    some = thumbs(5, 7)
    del some[2]["score"], some[3]["label"], some[4]["score"]
    some[6]["score"] = "high"
    file = write(tmp_path / "f.jsonl", some)
    with pytest.raises(DataError, match=r"f\.jsonl:7: score: got 'high'"):
        setup(tiny_model, needs={"scores": True}, train=file)
    some[6]["score"] = 2
    file = write(tmp_path / "f.jsonl", some)
    with pytest.raises(DataError, match=r"f\.jsonl:3: score: missing; .*1 more like it: row 5"):
        setup(tiny_model, needs={"scores": True}, train=file)
    assert len(setup(tiny_model, needs={"scores": True}, train=file, on_bad_row="skip").datasets["train"]) == 10
    for part in ("train", "validation"):
        sources = {"train": file, part: str(pairs_file)}
        with pytest.raises(DataError, match=rf"(?s)data\.{part}: .*pairs\.jsonl:1: score: a preference pair"):
            setup(tiny_model, needs={"scores": True}, on_bad_row="error" if part == "train" else "skip", **sources)


def test_prediction_needs_no_scores(tiny_model: Path, tmp_path: Path, pairs_file: Path) -> None:
    assert len(setup(tiny_model, "predict", needs={"scores": True}, test=str(pairs_file)).datasets["predict"]) == 96
    file = write(tmp_path / "f.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}])
    (batch,) = setup(tiny_model, "predict", needs={"scores": True}, test=file).predict_dataloader()
    assert batch.score is None  # type: ignore[union-attr]


def test_shuffled_labels_take_their_scores_along(tiny_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", thumbs(20, 30))
    data = setup(tiny_model, needs={"scores": True}, train=file, shuffle_labels=True)
    members = list(data.datasets["train"].examples())
    scores = [x.score for x in members]
    assert sorted(scores) == [i - 19.5 for i in range(50)]  # type: ignore[type-var]
    assert scores != sorted(scores)  # type: ignore[type-var]
    assert [x.desirable for x in members] == [x.score is not None and x.score < 0 for x in members]


# ------------------------------------------------------------------------------------------- equal halves

HALVES: dict[str, Any] = {"needs": {"equal_halves": True}, "sampler": "stratified"}


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"sampler": "shuffle"}, r"data\.sampler shuffle: .*--data\.sampler stratified"),
        ({"batch_size": 7}, r"data\.batch_size 7: .*even.*--data\.batch_size 8"),
        ({"eval_batch_size": 3}, r"data\.eval_batch_size 3: .*even.*--data\.eval_batch_size 4"),
    ],
)
def test_equal_halves_need_a_stratified_sampler_and_even_sizes(
    options: dict[str, Any], remedy: str, tiny_model: Path, thumbs_file: Path
) -> None:
    setup(tiny_model, train=str(thumbs_file), **HALVES)
    with pytest.raises(DataError, match=remedy):
        setup(tiny_model, train=str(thumbs_file), **(HALVES | options))


def test_validation_alone_needs_no_sampler(tiny_model: Path, thumbs_file: Path) -> None:
    needs = HALVES["needs"]
    setup(tiny_model, "validate", needs=needs, validation=str(thumbs_file))
    setup(tiny_model, "predict", needs=needs, test=str(thumbs_file), batch_size=3)
    with pytest.raises(DataError, match=r"data\.eval_batch_size 3"):
        setup(tiny_model, "validate", needs=needs, validation=str(thumbs_file), batch_size=4, eval_batch_size=3)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_held_out_rows_come_in_equal_halves(world: int, tiny_model: Path, tmp_path: Path) -> None:
    train, held_out = (write(tmp_path / f"{up}.jsonl", thumbs(up, down)) for up, down in ((8, 9), (7, 20)))
    data = setup(tiny_model, **HALVES, train=train, validation=held_out, eval_batch_size=4)
    assert "13 of 20 undesirable rows are left out, so that halves are equal" in data.datasets["validation"].report
    assert "left out" not in data.datasets["train"].report
    seen = []
    for rank in range(world):
        data.trainer = SimpleNamespace(world_size=world, global_rank=rank)  # type: ignore[assignment]
        loader: Any = data.val_dataloader()
        first, again = ([(texts(data, x), x.desirable.tolist()) for x in unpaired(loader)] for _ in range(2))
        loader.sampler.set_epoch(5)
        assert [(texts(data, x), x.desirable.tolist()) for x in unpaired(loader)] == first == again
        assert all(sum(labels) == len(labels) / 2 for _, labels in first)
        seen += [text for batch, _ in first for text in batch]
    assert len(set(seen)) == 14
    assert len(seen) == 14, "seven couples on any number of ranks, none twice"


def test_rows_that_count_twice_are_told(tiny_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "v.jsonl", thumbs(2, 20))
    data = setup(tiny_model, "validate", **HALVES, validation=file)
    data.trainer = SimpleNamespace(world_size=3, global_rank=0)  # type: ignore[assignment]
    with pytest.warns(DataWarning, match="2 rows count twice"):
        data.val_dataloader()


def test_held_out_pairs_are_equal_halves_as_they_are(tiny_model: Path, pairs_file: Path) -> None:
    data = setup(tiny_model, train=str(pairs_file), validation=str(pairs_file), **HALVES)
    batches = list(data.val_dataloader())
    assert all(isinstance(batch, PairedBatch) for batch in batches)
    assert sum(batch.num_examples for batch in batches) == 96


def test_all_rows_are_predicted(tiny_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "v.jsonl", thumbs(3, 20))
    data = setup(tiny_model, "predict", **HALVES, test=file)
    assert sum(batch.num_examples for batch in data.predict_dataloader()) == 23  # type: ignore[attr-defined]
    assert "left out" not in data.datasets["predict"].report


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.filterwarnings("ignore::halos_pl.data.DataWarning")
def test_equal_halves_of_one_class_are_refused(part: str, tiny_model: Path, tmp_path: Path, thumbs_file: Path) -> None:
    sources = {"train": str(thumbs_file), part: write(tmp_path / "f.jsonl", thumbs(4, 0))}
    with pytest.raises(DataError, match=rf"data\.{part}: .*f\.jsonl: all 4 rows are desirable.*as many of both"):
        setup(tiny_model, **HALVES, **sources)


# ----------------------------------------------------------------------------------------- shares of rows


def test_shares_of_each_class(tiny_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", thumbs(40, 60))

    def kept(**options: Any) -> list[int]:
        data = setup(tiny_model, train=file, validation=file, **options)
        assert len(data.datasets["validation"]) == 100, "held-out rows are all kept"
        return [int(row) for row in rows(data)]

    assert kept() == list(range(1, 101))
    small, large = kept(keep_desirable=0.25), kept(keep_desirable=0.5)
    assert small == sorted(small), "in the order of the data"
    assert [sum(row <= 40 for row in x) for x in (small, large)] == [10, 20]
    assert set(small) < set(large)
    assert set(range(41, 101)) < set(small)
    assert small == kept(keep_desirable=0.25, shuffle_labels=True, batch_size=3, sampler="stratified")
    assert small != kept(keep_desirable=0.25, seed=1)
    both = kept(keep_desirable=0.25, keep_undesirable=0.1)
    assert [x for x in both if x <= 40] == [x for x in small if x <= 40], "one class does not move the other"
    assert sum(x > 40 for x in both) == 6
    assert len(kept(keep_desirable=0.001, keep_undesirable=1e-9)) == 2, "a class never vanishes"


def test_shares_of_pairs_are_drawn_from_their_members(tiny_model: Path, pairs_file: Path) -> None:
    data = setup(tiny_model, train=str(pairs_file), keep_undesirable=0.25)
    assert data.datasets["train"].labels.sum() == 96
    assert len(data.datasets["train"]) == 96 + 24
    assert "kept 96 of 96 desirable and 24 of 96 undesirable rows" in data.datasets["train"].report


def test_kept_rows_are_shuffled_and_paired_among_themselves(tiny_model: Path, thumbs_file: Path) -> None:
    data = AlignmentData(train=str(thumbs_file), keep_desirable=0.1, shuffle_labels=True)
    data.needs = DataNeeds("unpaired", True, str(tiny_model), 260, 128)
    data.setup("fit")
    dataset = data.datasets["train"]
    assert len(dataset) == 6 + 32
    assert dataset.labels.sum() == 6, "the labels of the kept rows, permuted"
    assert dataset.partners is not None
    assert np.max(dataset.partners) < 38


@pytest.mark.parametrize("option", ["keep_desirable", "keep_undesirable"])
def test_shares_out_of_range_or_without_a_use(option: str, tiny_model: Path, pairs_file: Path) -> None:
    for share in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=rf"{option} must be in \(0, 1\], got {share}"):
            AlignmentData(**{option: share})  # type: ignore[arg-type]
    for view in ("sft", "paired"):
        options: dict[str, Any] = {option: 0.5, "train": str(pairs_file)}
        with pytest.raises(DataError, match=rf"data\.{option} 0\.5: this objective has no use for it"):
            setup(tiny_model, view=view, **options)  # type: ignore[arg-type]
