"""Rows of a view: completions that are read from disk, cut to size and given their y′ when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from halos_pl.data.collate import Example, Item
from halos_pl.data.store import Bad, Corpus, codes
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.truncation import Tokens
from halos_pl.data.views import Bools, Index, Members


class FeedbackDataset(Dataset[Any]):
    """Rows of one view; with partners, each member brings the y′ of the reference point.

    Attributes:
        members: the completions; a row is one of them or, of pairs, two.
        prompt_sizes: tokens of their prompts, control included, as they are cut, int64 [members].
        completion_sizes: tokens of the completions, as they are cut, int64 [members].
        partners: int64 [members], which member's completion is y′; or None.
        report: what a user should know of the rows.
        bad: file, row and message of those that were left out.
    """

    def __init__(self, corpus: Corpus, members: Members, encoder: CompletionTokenizer) -> None:
        self.corpus, self.members = corpus, members
        self.truncation = encoder.truncation
        self._control = {label: np.array(ids, np.int32) for label, ids in encoder.control.ids.items()}
        self.partners: Index | None = None
        self.report = ""
        self.bad: list[Bad] = []
        sizes = np.array([len(self._control[x]) for x in (False, True, None)])
        control = sizes[members.label]  # -1, no label, is the last one
        before, after = corpus.sizes["prompt"][members.record].astype(np.int64), members.sizes(corpus)
        prompts, self.completion_sizes = self.truncation.sizes(before, after, control)
        self.prompt_sizes = prompts + control
        self.cut = self.truncation.report(before, after, control)
        self.prompts, self.completions = codes(corpus.keys("prompt")[members.record]), codes(members.keys(corpus))

    def __len__(self) -> int:
        return len(self.members) // self.members.width

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: list[int]) -> list[Item]: ...
    def __getitem__(self, index: int | list[int]) -> Item | list[Item]:
        if isinstance(index, list):
            return [self[i] for i in index]
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        width = self.members.width
        mine = range(index * width, (index + 1) * width)
        examples = tuple(map(self.example, mine))
        if self.partners is None:
            return Item(examples)
        return Item(examples, tuple(self._completion(int(self.partners[m])) for m in mine))

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))

    def examples(self) -> Iterator[Example]:
        """All members, in their order."""
        return map(self.example, range(len(self.members)))

    def example(self, member: int) -> Example:
        """A completion after its prompt; its tokens are read now."""
        record, label = int(self.members.record[member]), int(self.members.label[member])
        desirable = None if label < 0 else bool(label)
        control, score = self._control[desirable], float(self.members.score[member])
        size = int(self.prompt_sizes[member]) - len(control)
        prompt = np.concatenate([self.truncation.prompt(self.corpus.tokens("prompt", record), size), control])
        keys = int(self.prompts[member]), int(self.completions[member])
        origin = self.corpus.origin(record)
        return Example(prompt, self._completion(member), desirable, *keys, origin, None if np.isnan(score) else score)

    def _completion(self, member: int) -> Tokens:
        side = "second" if self.members.side[member] else "first"
        whole = self.corpus.tokens(side, int(self.members.record[member]))
        return whole[: int(self.completion_sizes[member])]

    @property
    def labels(self) -> Bools:
        """[rows] bool, of unpaired rows."""
        return self.members.label == 1

    @property
    def identity(self) -> str:
        """Digest of which rows these are, and how they are labelled."""
        digest = blake2b(" ".join(sorted({path.parent.name for path in self.corpus.paths})).encode(), digest_size=16)
        for column in (self.members.record, self.members.side, self.members.label):
            digest.update(column.tobytes())
        return digest.hexdigest()

    @property
    def paired(self) -> bool:
        return self.members.width == 2

    @property
    def row_prompts(self) -> Index:
        """A number for each row's prompt, int64 [rows]."""
        return self.prompts[:: self.members.width]

    @property
    def prompt_digests(self) -> NDArray[np.uint64]:
        """Eight bytes of each member's prompt's digest, uint64 [members]."""
        digests = np.ascontiguousarray(self.corpus.keys("prompt")[self.members.record, 8:])
        return digests.view(np.uint64).reshape(-1)

    @property
    def lengths(self) -> Index:
        """Tokens of each row's longest sequence, int64 [rows]."""
        whole = self.prompt_sizes + self.completion_sizes
        return whole.reshape(-1, self.members.width).max(1)


def note_shared_prompts(train: FeedbackDataset, validation: FeedbackDataset) -> None:
    """Held-out rows whose prompts are trained on say little of prompts that are not."""
    shared = int(np.isin(validation.prompt_digests, np.unique(train.prompt_digests)).sum())
    if shared:
        of = f"{shared:,} of {len(validation.members):,} completions"
        validation.report += f"; {of} have a prompt that is trained on too"
