"""The LightningDataModule: files of feedback in, typed batches out."""

from __future__ import annotations

import copy
import warnings
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import DataNeeds
from halos_pl.data.collate import Collator, Item
from halos_pl.data.dataset import DatasetBuilder, FeedbackDataset
from halos_pl.data.options import check_ranges, refuse_unequal_halves, refuse_unused
from halos_pl.data.records import DataError, DataWarning
from halos_pl.data.sampling import EpochSampler
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.tokenizers import load_tokenizer

Stage = Literal["train", "validation", "test", "predict"]


class AlignmentData(L.LightningDataModule):
    """Feedback for alignment: thumbs up or down, preference pairs, or demonstrations.

    A source is a JSON, JSONL or Parquet file, a folder of them, or the name of a hub dataset; several may be listed.
    Rows are `prompt, completion, label`, `prompt, chosen, rejected` or `messages`, plain or conversational. The
    objective decides how they are read: KTO takes pairs as two labelled completions, SFT takes the desirable side. A
    single completion may have a `score`, a number that offline PPO can take for its reward, without a label too.

    Args:
        train: Source of the training rows.
        validation: Source of the held-out rows.
        test: Source of the rows for `test` and `predict`.
        train_split: Take the rows whose `split` field has this value (a hub dataset: this split of it).
        validation_split: Likewise for the held-out rows.
        test_split: Likewise for the test rows.
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
        sampler: `shuffle`, or `stratified`: equal halves of desirable and undesirable rows in every micro-batch of an
            even size; the larger class shows other rows each epoch.
        keep_desirable: Share of the desirable training rows to keep, in (0, 1] (KTO paper, figure 6): at least one row,
            drawn by the seed, so that a smaller share is part of a larger one. From pairs, after `unpair`.
        keep_undesirable: The same for the undesirable ones.
        shuffle_labels: Permute the labels and scores (or swap half of the pairs) of the training rows, of those that
            are kept: the control experiment.
        on_bad_row: `error` stops with a list of the malformed rows; `skip` goes on without them and lists them.
        seed: Of order, y′, random members and the rows to keep.
        num_workers: Worker processes of the loaders; rows and order do not depend on it.
        pad_to_multiple_of: Padded row lengths are rounded up to it.
        length_groups: Rows of a micro-batch are padded, and run, in this many groups of like length. More groups mean
            less padding and more passes; the numbers do not depend on it.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        train_split: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        eos_token: str | None = None,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        mismatch: Literal["dataset", "batch"] = "dataset",
        unpair: Literal["both", "one"] = "both",
        sampler: Literal["shuffle", "stratified"] = "shuffle",
        keep_desirable: float = 1.0,
        keep_undesirable: float = 1.0,
        shuffle_labels: bool = False,
        on_bad_row: Literal["error", "skip"] = "error",
        seed: int = 0,
        num_workers: int = 0,
        pad_to_multiple_of: int = 1,
        length_groups: int = 2,
    ) -> None:
        super().__init__()
        check_ranges(locals())
        self.sources: dict[Stage, tuple[str | list[str] | None, str | None]] = {
            "train": (train, train_split),
            "validation": (validation, validation_split),
            "test": (test, test_split),
            "predict": (test, test_split),
        }
        self.tokenizer_name, self.chat_template, self.eos_token = tokenizer, chat_template, eos_token
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.mismatch, self.unpair, self.sampler = mismatch, unpair, sampler
        self.keep_desirable, self.keep_undesirable = keep_desirable, keep_undesirable
        self.shuffle_labels, self.on_bad_row, self.seed = shuffle_labels, on_bad_row, seed
        self.num_workers, self.length_groups = num_workers, length_groups
        self.pad_to_multiple_of = pad_to_multiple_of
        self.datasets: dict[Stage, FeedbackDataset] = {}
        self.needs: DataNeeds | None = None
        self._prepared_for: DataNeeds | None = None
        self.encoder: CompletionTokenizer | None = None

    def setup(self, stage: str) -> None:
        self._ask_module()
        assert self.needs is not None
        if self.encoder is None:
            self.encoder = self._encoder(self.needs)
        stage = str(getattr(stage, "value", stage))
        refuse_unused(vars(self), self.needs)
        refuse_unequal_halves(vars(self), self.needs, stage)
        wanted: dict[str, tuple[Stage, ...]] = {
            "fit": ("train", "validation"),
            "validate": ("validation",),
            "test": ("test",),
            "predict": ("predict",),
        }
        if self.sources[wanted[stage][0]][0] is None:
            name = wanted[stage][0].replace("predict", "test")
            raise DataError(f"`{stage}` needs data: give `--data.{name} FILE` (or data.{name} in the config)")
        for part in wanted[stage]:
            if self.sources[part][0] is not None and part not in self.datasets:
                try:
                    self.datasets[part] = self._build(part)
                except DataError as error:
                    raise DataError(f"data.{part.replace('predict', 'test')}: {error}") from error

    def _ask_module(self) -> None:
        """Take the needs of the module at hand; what another module needed is forgotten."""
        module = None if self.trainer is None else self.trainer.lightning_module
        needs = getattr(module, "data_needs", None) or self.needs
        if not isinstance(needs, DataNeeds):
            raise TypeError("AlignmentData learns what to read from AlignmentModule: fit that, or set `needs`")
        if needs != self._prepared_for:
            self.needs, self._prepared_for = needs, needs
            self.encoder, self.datasets = None, {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """As the data use it, template and end-of-sequence token included; there from `setup` on."""
        if self.encoder is None:
            raise RuntimeError("no tokenizer yet: call setup() first (a Trainer does)")
        return self.encoder.tokenizer

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

    def _encoder(self, needs: DataNeeds) -> CompletionTokenizer:
        try:
            tokenizer = load_tokenizer(self.tokenizer_name or needs.tokenizer, needs.trust_remote_code)
        except ValueError as error:
            raise DataError(f"{error}; name one with --model.tokenizer") from error
        if len(tokenizer) > needs.vocab_size:
            raise DataError(
                f"the tokenizer {self.tokenizer_name or needs.tokenizer!r} has {len(tokenizer)} tokens, more than the "
                f"{needs.vocab_size} rows of the model's head; take the tokenizer that belongs to the model"
            )
        self._compare_tokenizers(tokenizer, needs)
        max_length, max_prompt_length = self.max_length, self.max_prompt_length
        if needs.max_positions is not None and max_length > needs.max_positions:
            rank_zero_info(f"max_length {max_length} is cut to the model's {needs.max_positions} positions")
            max_length = needs.max_positions
            if max_prompt_length is not None:
                max_prompt_length = min(max_prompt_length, max_length // 2)
        return CompletionTokenizer(
            tokenizer,
            chat_template=self.chat_template,
            eos_token=self.eos_token,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            control=needs.control,
        )

    def _compare_tokenizers(self, tokenizer: PreTrainedTokenizerBase, needs: DataNeeds) -> None:
        """The reference must read token ids as the policy does; a model folder without a tokenizer cannot be asked."""
        if needs.reference is None:
            return
        try:
            other = load_tokenizer(needs.reference, needs.trust_remote_code)
        except ValueError:
            return
        if other.get_vocab() != tokenizer.get_vocab():
            raise DataError(
                f"the reference {needs.reference!r} has another vocabulary than the policy's tokenizer: log-ratios of "
                "different tokens mean nothing"
            )

    def _build(self, stage: Stage) -> FeedbackDataset:
        assert self.needs is not None
        assert self.encoder is not None
        source, split = self.sources[stage]
        assert source is not None
        builder = DatasetBuilder(
            encoder=self.encoder,
            needs=self.needs,
            pair_all=self.needs.mismatched and stage != "predict" and not self._pairs_in_batch(stage),
            unpair=self.unpair,
            on_bad_row=self.on_bad_row,
            seed=self.seed,
        )
        training = stage == "train"
        return builder.build(
            source,
            split,
            training=training,
            labelled=stage != "predict",
            keep=(self.keep_desirable, self.keep_undesirable) if training else (1.0, 1.0),
            shuffle_labels=training and self.shuffle_labels,
        )

    def _pairs_in_batch(self, stage: Stage) -> bool:
        """Held-out rows are always paired over the dataset: their figures must not depend on a batch size."""
        assert self.needs is not None
        return self.needs.mismatched and self.mismatch == "batch" and stage == "train"

    def train_dataloader(self) -> DataLoader[Item]:
        return self._loader("train", self.batch_size)

    def val_dataloader(self) -> DataLoader[Item] | list[DataLoader[Item]]:
        return self._loader("validation", self.eval_batch_size) if "validation" in self.datasets else []

    def test_dataloader(self) -> DataLoader[Item]:
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Item]:
        return self._loader("predict", self.eval_batch_size)

    def _loader(self, stage: Stage, batch_size: int) -> DataLoader[Item]:
        assert self.needs is not None
        assert self.encoder is not None
        dataset, training = self.datasets[stage], stage == "train"
        halves = self.sampler == "stratified" if training else self.needs.equal_halves and stage != "predict"
        world = 1 if self.trainer is None else self.trainer.world_size
        sampler = EpochSampler(
            len(dataset),
            shuffle=training,
            seed=self.seed,
            num_replicas=world,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            drop_last=training,
            labels=dataset.labels if halves and not dataset.paired else None,
        )
        if not len(sampler):
            raise DataError(
                f"no row is left to train on: {len(dataset)} rows on {world} ranks, sampler {self.sampler} "
                "(stratified needs both classes)"
            )
        if not training and (twice := sampler.total_size - (size := len(sampler.order()))):
            warnings.warn(
                f"{stage}: {twice} of {size} rows count twice, so that all ranks have as many",
                DataWarning,
                stacklevel=2,
            )
        collator = Collator(
            view=self.needs.view,
            pad_id=self.encoder.tokenizer.pad_token_id,
            vocab_size=self.needs.vocab_size,
            max_length=self.encoder.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            length_groups=self.length_groups,
            pair_in_batch=self._pairs_in_batch(stage),
            scores=self.needs.scores and stage != "predict",
        )
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=self._pairs_in_batch(stage),  # a last batch of one row would find no y′
            collate_fn=collator,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
