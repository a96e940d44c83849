"""What is inspected: the rows of the data options, tokenized and in the view that a training would have of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from halos_pl.batch import DataNeeds
from halos_pl.data import AlignmentData, DataError
from halos_pl.data.builder import DatasetBuilder
from halos_pl.data.dataset import FeedbackDataset
from halos_pl.data.encoder import make_encoder
from halos_pl.data.options import refuse_unequal_halves, refuse_unused
from halos_pl.data.records import Paired, parse_record
from halos_pl.data.sources import Source, read_rows
from halos_pl.data.store import Corpus
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.losses import DPO, KTO, SFT, Objective, PPOOffline
from halos_pl.models import ModelSource
from halos_pl.needs import data_needs

Stage = Literal["train", "validation", "test"]
_STAND_IN = "nano:model"
"""The tokenizer of those who name none."""
HEAD = 200  # rows of a source that are looked at for whether its files are plain


@dataclass(frozen=True)
class Subject:
    """Rows under inspection.

    Args:
        dataset: in the view of the objective.
        data: the options.
        encoder: tokenized them.
        needs: of the objective.
        objective: the one asked for, or the one that suits the rows.
        inferred: whether nobody asked for it.
        tokenizer: its name.
        stand_in: whether nobody named one.
        stage: whose sources.
        sources: name, records and bad rows of each.
        plain: file → whether its rows are plain texts, by the first that was seen.
    """

    dataset: FeedbackDataset
    data: AlignmentData
    encoder: CompletionTokenizer
    needs: DataNeeds
    objective: Objective
    inferred: bool
    tokenizer: str
    stand_in: bool
    stage: Stage
    sources: list[tuple[str, int, int]]
    plain: dict[str, bool]

    @property
    def kind(self) -> Literal["labelled", "pairs", "demonstrations"]:
        if self.dataset.paired:
            return "pairs"
        return "demonstrations" if self.needs.view == "sft" else "labelled"


def read(data: AlignmentData, model: Mapping[str, Any], stage: Stage = "train") -> Subject:
    """Read and tokenize what the options name.

    Args:
        data: the options; nothing of it is set up.
        model: what is known of the module: `objective`, `policy`, `config`, `tokenizer`, `trust_remote_code`.
        stage: whose sources to take.

    Raises:
        DataError: no data, or nothing that can be used; an option that the objective asked for has no use for.
        ValueError: of tokenizers, templates and models that cannot be used.
    """
    if not data.sources[stage]:
        raise DataError(f"no data to inspect: give --data.{stage} FILE")
    objective: Objective | None = model.get("objective")
    needs = _needs(objective or KTO(), model)
    data.encoder = encoder = make_encoder(vars(data), needs)
    prepared = [data.preparation(source) for source in data.sources[stage]]
    corpora = [Corpus(x.blocks) for x in prepared]
    if objective is None:
        chosen = _suited(corpora, pair_labels=data.pair_labels)
        needs = _needs(chosen, model)
    else:
        chosen = objective
    training = stage == "train"
    refuse_unused(vars(data), needs)
    if training:
        refuse_unequal_halves(vars(data), needs, "fit")
    builder = DatasetBuilder(
        data.preparation, needs, pair_all=False, unpair=data.unpair, seed=data.seed, pair_labels=data.pair_labels
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the loss can only push one way")  # the report says so
        dataset = builder.build(
            data.sources[stage],
            training=training,
            hold_out=data.validation_share if stage != "test" else None,
            keep=(data.keep_desirable, data.keep_undesirable) if training else (1.0, 1.0),
            shuffle_labels=training and data.shuffle_labels,
        )
    named = data.tokenizer_name or needs.tokenizer
    stand_in = not (data.tokenizer_name or model.get("tokenizer") or model.get("policy"))
    counts = [(x.source.name, len(y), len(x.bad)) for x, y in zip(prepared, corpora, strict=True)]
    plain = _plain(data.sources[stage])
    return Subject(dataset, data, encoder, needs, chosen, objective is None, named, stand_in, stage, counts, plain)


def _needs(objective: Objective, model: Mapping[str, Any]) -> DataNeeds:
    policy, config = model.get("policy"), model.get("config")
    trusted = bool(model.get("trust_remote_code"))
    tokenizer = model.get("tokenizer") or policy or _STAND_IN
    if policy or config:
        source = ModelSource(name=policy, config=config, trust_remote_code=trusted)
        return data_needs(objective, [source], tokenizer, trust_remote_code=trusted)
    here = ModelSource(name=_STAND_IN)
    needs = data_needs(objective, [here], tokenizer, trust_remote_code=trusted)
    return replace(needs, vocab_size=2**31 - 1, max_positions=None)  # whose head and positions are not known


def _suited(corpora: list[Corpus], *, pair_labels: bool) -> Objective:
    """The objective that reads most of the rows as they are."""
    singles = sum(int((~x.paired).sum()) for x in corpora)
    if not singles or pair_labels:
        return DPO()
    pairs = sum(int(x.paired.sum()) for x in corpora)
    if pairs or any((x.label >= 0).any() for x in corpora):
        return KTO()
    scored = sum(int((x.score == x.score).sum()) for x in corpora)
    return PPOOffline(reward="score") if scored else SFT()


def _plain(sources: list[Source]) -> dict[str, bool]:
    """Of the files whose rows are among the first of their source; "" stands for any other."""
    found: dict[str, bool] = {}
    for source in dict.fromkeys(sources):
        for origin, row in islice(read_rows(source), HEAD):
            if origin.file in found:
                continue
            try:
                record = parse_record(row, origin)
            except DataError:
                continue
            texts = [record.prompt, record.chosen if isinstance(record, Paired) else record.completion]
            found[origin.file] = all(isinstance(x, str) for x in texts)
    found[""] = all(found.values()) and bool(found)
    return found
