"""The LightningDataModule: files of feedback in, typed batches out."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import lightning as L
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import DataNeeds
from halos_pl.data.builder import DatasetBuilder
from halos_pl.data.dataset import FeedbackDataset, note_shared_prompts
from halos_pl.data.encoder import make_encoder
from halos_pl.data.loader import LoaderOptions, Stage, make_loader, refuse_other_rows
from halos_pl.data.options import check_ranges, refuse_unequal_halves, refuse_unused, refuse_weights
from halos_pl.data.place import counted_in, go_on, place_of
from halos_pl.data.prepare import Preparation, Prepared
from halos_pl.data.records import DataError
from halos_pl.data.sources import Source, as_sources, copy_rows
from halos_pl.data.tokenization import CompletionTokenizer

Sources: TypeAlias = Source | str | list[Source | str]


class AlignmentData(L.LightningDataModule):
    """Feedback for alignment: thumbs up or down, preference pairs, or demonstrations.

    A source is a JSON, JSONL, CSV or Parquet file, a folder of them, the name of a hub dataset, or a reader's name (hh,
    shp, oasst, ...); several may be mixed. Rows are `prompt, completion, label`, `prompt, chosen, rejected` or
    `messages`, plain or conversational. The objective decides how they are read: KTO takes pairs as two labelled
    completions, SFT takes the desirable side. A single completion may have a `score`, a number that offline PPO can
    take for its reward, without a label too.

    Args:
        train: Source of the training rows: a name, or {path, reader, split, limit, weight, threshold, columns,
            streaming}, or a list of these.
        validation: Source of the held-out rows.
        validation_share: Without `validation`, hold out the rows of this share of the prompts of `train`: by a digest
            of the prompt, so that no prompt is on both sides and the same ones are held out in every run.
        test: Source of the rows for `test` and `predict`.
        train_split: Take the rows whose `split` field has this value (a hub dataset: this split of it).
        validation_split: Likewise for the held-out rows (without `validation`, of `train`).
        test_split: Likewise for the test rows (without `test`, of `train`).
        tokenizer: Folder or hub name. Default: the module's (its `tokenizer`, else its `policy`).
        chat_template: Template of conversational rows: tulu2, tulu2-halos, chatml, plain, or a Jinja file. Default: the
            tokenizer's own.
        eos_token: The token that ends a completion. Default: the tokenizer's.
        max_length: Tokens of prompt and completion together.
        max_prompt_length: Where a row is longer than that, its prompt is first cut on the left to this many tokens,
            then the completion at its end. Default: half of max_length.
        batch_size: Examples (or pairs) of a micro-batch on each rank.
        eval_batch_size: The same for validation and test. Default: batch_size.
        mismatch: Where KTO's y′ comes from. `dataset`: a seeded derangement of all rows, the same whatever the batch,
            rank or epoch. `batch`: the same micro-batch, as in the paper; depends on batch size and ranks, leaves out
            the last rows of an epoch that fill no batch, and applies to training rows only.
        unpair: For KTO from pairs: both members of each pair, or one at random (f(seed, row)).
        pair_labels: For DPO from thumbs: prefer the i-th desirable completion of a prompt to its i-th undesirable one.
        assistant_turns: For SFT from conversations: imitate the last reply, or all of them (each is a row).
        special_tokens: `refuse` messages and plain completions that contain a special token of the tokenizer or a
            marker of the chat template, or `allow` them.
        sampler: `shuffle`, or `stratified`: equal halves of desirable and undesirable rows in every micro-batch of an
            even size; the larger class shows other rows each epoch.
        keep_desirable: Share of the desirable training rows to keep, in (0, 1] (KTO paper, figure 6): at least one row,
            drawn by the seed, so that a smaller share is part of a larger one. From pairs, after `unpair`.
        keep_undesirable: The same for the undesirable ones.
        shuffle_labels: Permute the labels and scores (or swap half of the pairs) of the training rows, of those that
            are kept: the control experiment.
        on_bad_row: `error` stops with a list of the malformed rows; `skip` goes on without them and lists them.
        seed: Of order, y′, random members and the rows to keep.
        group_by_length: Training micro-batches of rows of like length, in random order: less padding.
        group_by_prompt: Training rows of one prompt come together, in one micro-batch where they fit.
        max_tokens: Most tokens of a micro-batch, padding included, y′ not: long rows come in smaller micro-batches.
        num_workers: Worker processes of the loaders; rows and order do not depend on it.
        prepare_workers: Processes that tokenize. Default: all cores for large data, else one.
        cache: Folder of tokenized data, found again when nothing has changed. Default: $HALOS_CACHE, else halos_pl in
            ~/.cache.
        pad_to_multiple_of: Padded row lengths are rounded up to it.
        length_groups: Rows of a micro-batch are padded, and run, in this many groups of like length. More groups mean
            less padding and more passes; the numbers do not depend on it.
    """

    def __init__(
        self,
        train: Sources | None = None,
        validation: Sources | None = None,
        test: Sources | None = None,
        train_split: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = None,
        validation_share: float | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        eos_token: str | None = None,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        mismatch: Literal["dataset", "batch"] = "dataset",
        unpair: Literal["both", "one"] = "both",
        pair_labels: bool = False,
        assistant_turns: Literal["last", "all"] = "last",
        special_tokens: Literal["refuse", "allow"] = "refuse",
        sampler: Literal["shuffle", "stratified"] = "shuffle",
        keep_desirable: float = 1.0,
        keep_undesirable: float = 1.0,
        shuffle_labels: bool = False,
        on_bad_row: Literal["error", "skip"] = "error",
        seed: int = 0,
        group_by_length: bool = False,
        group_by_prompt: bool = False,
        max_tokens: int | None = None,
        num_workers: int = 0,
        prepare_workers: int | None = None,
        cache: str | None = None,
        pad_to_multiple_of: int = 1,
        length_groups: int = 2,
    ) -> None:
        super().__init__()
        check_ranges(locals())
        self.sources: dict[Stage, list[Source]] = {
            "train": as_sources(train, train_split),
            "validation": as_sources(validation, validation_split),
            "test": as_sources(test, test_split),
        }
        splits: dict[Stage, str | None] = {"validation": validation_split, "test": test_split}
        for part, split in splits.items():
            if split is not None and not self.sources[part]:  # another split of what is trained on; rows count once
                self.sources[part] = [replace(x, weight=1.0) for x in as_sources(train, split)]
        refuse_weights(self.sources)
        self.sources["predict"] = self.sources["test"]
        if validation_share is not None:
            self.sources["validation"] = self.sources["train"]
        self._prepared: dict[Source, Prepared] = {}
        self.validation_share = validation_share
        self.tokenizer_name, self.chat_template, self.eos_token = tokenizer, chat_template, eos_token
        self.max_length, self.max_prompt_length, self.special_tokens = max_length, max_prompt_length, special_tokens
        self.batch_size, self.eval_batch_size, self.max_tokens = batch_size, eval_batch_size or batch_size, max_tokens
        self.mismatch, self.unpair, self.pair_labels, self.sampler = mismatch, unpair, pair_labels, sampler
        self.assistant_turns = assistant_turns
        self.group_by_length, self.group_by_prompt = group_by_length, group_by_prompt
        self.keep_desirable, self.keep_undesirable = keep_desirable, keep_undesirable
        self.shuffle_labels, self.on_bad_row, self.seed = shuffle_labels, on_bad_row, seed
        self.num_workers, self.prepare_workers, self.length_groups = num_workers, prepare_workers, length_groups
        self.cache, self.pad_to_multiple_of = cache, pad_to_multiple_of
        self.datasets: dict[Stage, FeedbackDataset] = {}
        self.needs: DataNeeds | None = None
        self._prepared_for: DataNeeds | None = None
        self.encoder: CompletionTokenizer | None = None

    def setup(self, stage: str) -> None:
        self._ask_module()
        assert self.needs is not None
        if self.encoder is None:
            self.encoder = make_encoder(vars(self), self.needs)
        stage = str(getattr(stage, "value", stage))
        refuse_unused(vars(self), self.needs)
        refuse_unequal_halves(vars(self), self.needs, stage)
        wanted: dict[str, tuple[Stage, ...]] = {
            "fit": ("train", "validation"),
            "validate": ("validation",),
            "test": ("test",),
            "predict": ("predict",),
        }
        if not self.sources[wanted[stage][0]]:
            name = wanted[stage][0].replace("predict", "test")
            raise DataError(f"`{stage}` needs data: give `--data.{name} FILE` (or data.{name} in the config)")
        for part in wanted[stage]:
            if self.sources[part] and part not in self.datasets:
                try:
                    self.datasets[part] = self._build(part)
                except DataError as error:
                    raise DataError(f"data.{part.replace('predict', 'test')}: {error}") from error
        if stage == "fit" and "validation" in self.datasets and self.validation_share is None:
            note_shared_prompts(self.datasets["train"], self.datasets["validation"])

    def save_bad_rows(self, path: Path) -> int:
        """Copy the rows that were left out as bad to a file, bit for bit where they are lines of a file.

        Returns:
            How many; with none, no file is written.
        """
        wanted = {(file, row) for dataset in self.datasets.values() for file, row, _ in dataset.bad}
        count = len(wanted)
        if wanted:
            with path.open("wb") as out:
                for source in dict.fromkeys(source for part in self.datasets for source in self.sources[part]):
                    wanted -= copy_rows(source, wanted, out)
        return count - len(wanted)

    def _ask_module(self) -> None:
        """Take the needs of the module at hand; what another module needed is forgotten."""
        module = None if self.trainer is None else self.trainer.lightning_module
        needs = getattr(module, "data_needs", None) or self.needs
        if not isinstance(needs, DataNeeds):
            raise TypeError("AlignmentData learns what to read from AlignmentModule: fit that, or set `needs`")
        if needs != self._prepared_for:
            self.needs, self._prepared_for = needs, needs
            self.encoder, self.datasets, self._prepared = None, {}, {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """As the data use it, template and end-of-sequence token included; there from `setup` on."""
        return self.preparation.encoder.tokenizer

    @property
    def sampling_tokenizer(self) -> PreTrainedTokenizerBase:
        """What an exported policy is to be sampled with: where good completions have a control text (CSFT), the chat
        template's generation prompt ends in it."""
        tokenizer = self.tokenizer
        assert self.encoder is not None
        if self.encoder.sampling_template is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = self.encoder.sampling_template
        return tokenizer

    @property
    def preparation(self) -> Preparation:
        """How sources are tokenized; there from `setup` on."""
        if self.encoder is None:
            raise RuntimeError("no tokenizer yet: call setup() first (a Trainer does)")
        return Preparation(
            self.encoder,
            on_bad_row=self.on_bad_row,
            turns=self.assistant_turns,
            cache=None if self.cache is None else Path(self.cache).expanduser(),
            workers=self.prepare_workers,
            known=self._prepared,
        )

    def _build(self, stage: Stage) -> FeedbackDataset:
        assert self.needs is not None
        training = stage == "train"
        builder = DatasetBuilder(
            self.preparation,
            needs=self.needs,
            pair_all=self.needs.mismatched and stage != "predict" and not self._pairs_in_batch(stage),
            unpair=self.unpair,
            pair_labels=self.pair_labels,
            seed=self.seed,
        )
        return builder.build(
            self.sources[stage],
            training=training,
            labelled=stage != "predict",
            hold_out=self.validation_share if stage in ("train", "validation") else None,
            keep=(self.keep_desirable, self.keep_undesirable) if training else (1.0, 1.0),
            shuffle_labels=training and self.shuffle_labels,
        )

    def _pairs_in_batch(self, stage: Stage) -> bool:
        """Held-out rows are always paired over the dataset: their figures must not depend on a batch size."""
        assert self.needs is not None
        return self.needs.mismatched and self.mismatch == "batch" and stage == "train"

    def state_dict(self) -> dict[str, Any]:
        world = 1 if self.trainer is None else self.trainer.world_size
        return counted_in(vars(self), self.datasets["train"].identity, world)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer is not None and self.trainer.state.fn == "fit":
            go_on(state_dict, self.state_dict(), self.trainer, lambda: len(self._loader("train")))

    def train_dataloader(self) -> DataLoader[Any]:
        if getattr(self.trainer, "overfit_batches", 0):
            raise DataError("trainer.overfit_batches: to train on the same few rows, give data.train a limit")
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        return self._loader("validation") if "validation" in self.datasets else []

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("predict")

    def _loader(self, stage: Stage) -> DataLoader[Any]:
        assert self.needs is not None
        options = LoaderOptions(
            batch_size=self.batch_size if stage == "train" else self.eval_batch_size,
            max_tokens=self.max_tokens,
            stratified=self.sampler == "stratified" if stage == "train" else self.needs.equal_halves,
            group_by_length=self.group_by_length,
            group_by_prompt=self.group_by_prompt,
            pair_in_batch=self._pairs_in_batch(stage),
            pad_to_multiple_of=self.pad_to_multiple_of,
            length_groups=self.length_groups,
            num_workers=self.num_workers,
            seed=self.seed,
        )
        world, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        refuse_other_rows(self.datasets[stage], stage)
        place = partial(place_of, self.trainer) if stage == "train" and self.trainer is not None else None
        what = self.datasets[stage], self.preparation.encoder, self.needs, options
        return make_loader(*what, stage=stage, world=world, rank=rank, place=place)
