"""A few rows as the model would see them: token by token, what is scored apart from what is only read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from halos_pl.inspect.copies import place
from halos_pl.inspect.subject import Subject
from halos_pl.inspect.tokens import special_ids

Facts = dict[str, Any]
SHOWN = {"prompt": (60, 80), "completion": (120, 60)}
"""Tokens at the beginning and at the end of a part that stay where it is long."""


def choose(subject: Subject, count: int) -> list[tuple[int, str]]:
    """Rows and why each was taken: a typical one of each class, one that is cut (else the longest), then drawn ones."""
    dataset, width = subject.dataset, subject.dataset.members.width
    label, whole = dataset.members.label[::width], dataset.lengths
    found: list[tuple[int, str]] = []

    def add(rows: NDArray[np.bool_], scores: NDArray[Any], why: str) -> None:
        """The row of the least score, the first of several."""
        left = rows.copy()
        left[[row for row, _ in found]] = False
        if left.any():
            places = np.flatnonzero(left)
            found.append((int(places[np.argmin(scores[left])]), why))

    for name, rows in (("desirable", label == 1), ("undesirable", label == 0), ("", label == -1)):
        if rows.any():
            typical = np.percentile(whole[rows], 50, method="inverted_cdf")
            what = "" if subject.kind != "labelled" else f"{name}, "
            add(rows, np.abs(whole - typical), f"{what}of typical length")
    before = dataset.corpus.sizes["prompt"][dataset.members.record].astype(np.int64)
    full = before + dataset.members.sizes(dataset.corpus)
    cut = (dataset.completion_sizes < dataset.members.sizes(dataset.corpus)) | (dataset.prompt_sizes < before)
    long = cut.reshape(-1, width).any(1)
    if long.any():
        add(long, np.arange(len(dataset)), "the first that is cut")
    else:
        add(np.ones(len(dataset), bool), -full.reshape(-1, width).max(1), "the longest")
    taken = {row for row, _ in found}
    drawn = np.random.default_rng(0).permutation(len(dataset))[: count + len(found)].tolist()
    return (found + [(row, "drawn") for row in drawn if row not in taken])[:count]


def render(subject: Subject, count: int) -> list[Facts]:
    """Examples as values that JSON can hold: `parts` in order, each with the pieces of its text, one a token."""
    shown = []
    for row, why in choose(subject, count):
        width = subject.dataset.members.width
        members = range(row * width, (row + 1) * width)
        parts = [_prompt(subject, members[0]), *(_completion(subject, x) for x in members)]
        shown.append({"place": place(subject.dataset, members[0]), "why": why, "parts": parts})
    return shown


def _prompt(subject: Subject, member: int) -> Facts:
    dataset = subject.dataset
    ids = dataset.example(member).prompt.tolist()
    whole = int(dataset.corpus.sizes["prompt"][dataset.members.record[member]])
    label = int(dataset.members.label[member])
    whole += len(subject.encoder.control.ids[None if label < 0 else bool(label)])
    return _part(subject, "prompt", ids, whole - len(ids))


def _completion(subject: Subject, member: int) -> Facts:
    dataset = subject.dataset
    ids = dataset.example(member).completion.tolist()
    whole = int(dataset.members.sizes(dataset.corpus)[member])
    names = {1: "desirable", 0: "undesirable", -1: "completion"}
    if subject.kind == "pairs":
        names |= {1: "chosen", 0: "rejected"}
    if subject.kind == "demonstrations":
        names[1] = "completion"
    return _part(subject, names[int(dataset.members.label[member])], ids, whole - len(ids))


def _part(subject: Subject, name: str, ids: list[int], cut: int) -> Facts:
    """Name, number of tokens, how many more were cut off, and the pieces; those in the middle of a long one are left
    out, and their number stands in their place."""
    tokenizer = subject.encoder.tokenizer
    special = special_ids(tokenizer)
    first, last = SHOWN["prompt" if name == "prompt" else "completion"]
    runs = [ids] if len(ids) <= first + last + 1 else [ids[:first], ids[-last:]]
    shown: list[Facts] = []
    for i, run in enumerate(runs):
        if i:
            shown.append({"left_out": len(ids) - first - last})
        shown += [
            {"text": text, "kind": _kind(id, special, subject.encoder.eos_token_id, name)}
            for id, text in zip(run, pieces(tokenizer, run), strict=True)
        ]
    return {"name": name, "tokens": len(ids), "cut": cut, "pieces": shown}


def _kind(id: int, special: set[int], eos: int, name: str) -> str:
    if id == eos and name != "prompt":
        return "eos"
    return "special" if id in special else "text"


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token; of a character that takes several tokens, the last one has it and the others nothing."""
    texts, told = [], ""
    for end in range(1, len(ids) + 1):
        so_far = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if so_far.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            texts.append("")
            continue
        same = len(told) if so_far.startswith(told) else 0
        texts.append(so_far[same:])
        told = so_far
    return texts
