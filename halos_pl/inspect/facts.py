"""All that is known of the rows, as plain values that JSON can hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from halos_pl.data.batches import EpochBatches
from halos_pl.inspect import copies
from halos_pl.inspect.subject import Subject
from halos_pl.inspect.tokens import repeats_prompt, specials_in_prompts

Index = NDArray[np.int64]
Facts = dict[str, Any]
PERCENTILES = {"min": 0, "p5": 5, "p50": 50, "p95": 95, "p99": 99, "max": 100}
BARS = 40  # of a histogram
BAD_SHOWN = 10
RANGE = (1.0, 4 / 3)
"""Of λ_D n_D / (λ_U n_U), by the KTO paper."""


def gather(subject: Subject) -> Facts:
    """The facts of a report; `warnings` and `examples` come on top."""
    sizes = _sizes(subject)
    facts: Facts = {
        "stage": subject.stage,
        "sources": [{"name": name, "records": records, "bad": bad} for name, records, bad in subject.sources],
        "tokenizer": _tokenizer(subject),
        "objective": {"name": type(subject.objective).__name__, "inferred": subject.inferred},
        "mismatched": subject.needs.mismatched,
        "kind": subject.kind,
        "rows": len(subject.dataset),
        "completions": len(subject.dataset.members),
        "summary": subject.dataset.report.splitlines()[0],
        "bad_rows": {
            "rows": len(subject.dataset.bad),
            "listed": [message for *_, message in subject.dataset.bad[:BAD_SHOWN]],
        },
        "classes": _classes(subject),
        "weights": _weights(subject),
        "lengths": {name: _percentiles(x) for name, x in sizes.items()},
        "tokens": int((subject.dataset.prompt_sizes + subject.dataset.completion_sizes).sum()),
        "truncation": _truncation(subject, sizes),
        "padding": _padding(subject),
        "prompts": copies.prompts(subject.dataset),
        "duplicates": copies.duplicates(subject.dataset),
        "contradictions": copies.contradictions(subject.dataset),
        "undecided_pairs": copies.undecided(subject.dataset),
        "length_by_class": _length_by_class(subject),
        "histograms": _histograms(sizes),
    }
    return facts | _of_tokens(subject)


def _sizes(subject: Subject) -> dict[str, Index]:
    """Tokens, nothing cut, of all rows' parts: EOS and control included."""
    dataset, width = subject.dataset, subject.dataset.members.width
    control = np.array([len(subject.encoder.control.ids[x]) for x in (False, True, None)])[dataset.members.label]
    prompt = dataset.corpus.sizes["prompt"][dataset.members.record].astype(np.int64) + control
    completion = dataset.members.sizes(dataset.corpus)
    sizes = {"prompt": prompt[::width], "completion": completion}
    if subject.kind != "demonstrations":
        for label, name in ((1, "desirable"), (0, "undesirable")):
            if (mine := dataset.members.label == label).any():
                sizes[_side(subject, name)] = completion[mine]
    return sizes | {"whole": prompt + completion}


def _side(subject: Subject, name: str) -> str:
    return {"desirable": "chosen", "undesirable": "rejected"}[name] if subject.kind == "pairs" else name


def _percentiles(x: Index) -> dict[str, int]:
    found = np.percentile(x, list(PERCENTILES.values()), method="inverted_cdf")
    return dict(zip(PERCENTILES, found.astype(int).tolist(), strict=True))


def _tokenizer(subject: Subject) -> Facts:
    return {
        "name": subject.tokenizer,
        "stand_in": subject.stand_in,
        "vocabulary": len(subject.encoder.tokenizer),
        "eos": str(subject.encoder.tokenizer.eos_token),
        "chat_template": subject.encoder.chat_template is not None,
    }


def _classes(subject: Subject) -> Facts | None:
    if subject.kind != "labelled":
        return None
    up, rows = int(subject.dataset.labels.sum()), len(subject.dataset)
    return {"desirable": up, "undesirable": rows - up, "share": up / rows}


def _weights(subject: Subject) -> Facts | None:
    """The weight of either class that brings λ_D n_D / (λ_U n_U) into [1, 4/3] while the other one's is 1."""
    classes, objective = _classes(subject), subject.objective
    if classes is None or not hasattr(objective, "desirable_weight"):
        return None
    stratified = subject.data.sampler == "stratified" and subject.stage == "train"
    up, down = (1, 1) if stratified else (classes["desirable"], classes["undesirable"])
    if not up or not down:
        return None
    ratio = up / down
    used = {x: float(getattr(objective, f"{x}_weight")) for x in ("desirable", "undesirable")}
    weighed = ratio * used["desirable"] / used["undesirable"] if used["undesirable"] else None
    return {
        "stratified": stratified,
        "desirable_weight": [RANGE[0] / ratio, RANGE[1] / ratio],
        "undesirable_weight": [ratio / RANGE[1], ratio / RANGE[0]],
        "equal": {"ratio": ratio, "inside": _inside(ratio)},
        "in_use": {**used, "ratio": weighed, "inside": weighed is not None and _inside(weighed)},
    }


def _inside(ratio: float) -> bool:
    return RANGE[0] - 1e-9 <= ratio <= RANGE[1] + 1e-9


def _truncation(subject: Subject, sizes: dict[str, Index]) -> Facts:
    cut, whole = subject.dataset.cut, sizes["whole"]
    return {
        "max_length": subject.encoder.max_length,
        "max_prompt_length": subject.encoder.truncation.max_prompt_length,
        "limited_by_model": subject.encoder.max_length < subject.data.max_length,
        "rows": cut.truncated,
        "share": cut.truncated / cut.rows,
        "prompts": cut.prompts,
        "completions": cut.completions,
        "cuts_nothing": int(whole.max()),
        "cuts_one_percent": int(np.percentile(whole, 99, method="inverted_cdf")),
    }


def _padding(subject: Subject) -> Facts | None:
    """Shares of padded positions in the first epoch on one rank, by how rows come together."""
    dataset, size = subject.dataset, min(subject.data.batch_size, len(subject.dataset))
    shares = {}
    for name, grouped in (("shuffle", False), ("group_by_length", True)):
        batches = EpochBatches(len(dataset), batch_size=size, shuffle=True, seed=subject.data.seed,
                               lengths=dataset.lengths, members=dataset.members.width,
                               group_by_length=grouped)  # fmt: skip
        shares[name] = batches.padding()
    return {"batch_size": subject.data.batch_size, **shares}


def _length_by_class(subject: Subject) -> Facts | None:
    """How well length alone tells the classes apart.

    `longer` is the probability that a desirable completion is longer than an undesirable one, ties counted half (the
    area under the ROC curve; of pairs, within the pair); `errors` is its distance from 1/2 in standard errors.
    """
    dataset = subject.dataset
    sizes, label = dataset.members.sizes(dataset.corpus), dataset.members.label
    if subject.kind == "pairs":
        up, down = sizes[::2], sizes[1::2]
        longer, shorter = float((up > down).mean()), float((up < down).mean())
        told = len(up) * (longer + shorter)  # pairs that are no ties: a sign test
        facts = {"chosen_longer": longer, "chosen_shorter": shorter, "equal": 1 - longer - shorter}
        area, error = longer + (1 - longer - shorter) / 2, 0.5 / len(up) * told**0.5
    elif subject.kind == "labelled" and (label == 1).any() and (label == 0).any():
        up, down = sizes[label == 1], np.sort(sizes[label == 0])
        below = np.searchsorted(down, up, "left") + np.searchsorted(down, up, "right")
        area, facts = float(below.mean() / 2 / len(down)), {}
        error = ((len(up) + len(down) + 1) / (12 * len(up) * len(down))) ** 0.5  # Mann and Whitney's
    else:
        return None
    medians = {"median_desirable": _percentiles(up)["p50"], "median_undesirable": _percentiles(down)["p50"]}
    return {**medians, **facts, "longer": area, "errors": abs(area - 0.5) / error if error else 0.0}


def _of_tokens(subject: Subject) -> Facts:
    dataset, corpus = subject.dataset, subject.dataset.corpus
    members, width = dataset.members, dataset.members.width
    plain = np.array([subject.plain.get(x, subject.plain[""]) for x in corpus.files])[corpus.file[members.record]]
    special = specials_in_prompts(corpus, subject.encoder)[members.record] > 0
    first, second = repeats_prompt(corpus, subject.encoder)
    repeats = np.where(members.side == 0, first[members.record], second[members.record])
    short = members.sizes(corpus) <= 2

    def found(which: NDArray[np.bool_]) -> Facts:
        rows = np.flatnonzero(which)
        return {"rows": len(rows), "examples": [copies.place(dataset, int(x)) for x in rows[: copies.SHOWN]]}

    head = np.arange(len(members)) % width == 0  # one prompt a pair
    return {
        "plain_prompts": int((plain & head).sum()),
        "special_tokens_in_plain_prompts": found(plain & special & head),
        "one_token_completions": found(short),
        "repeated_prompts": found(repeats),
    }


def _histograms(sizes: dict[str, Index]) -> dict[str, Facts]:
    """Counts of lengths in bars of `width` tokens from `begin` on; the longest 1 % of the rows are in the last bar."""
    shared = [name for name in sizes if name not in ("prompt", "completion", "whole")]
    drawn = {}
    for name in ["prompt", *(shared or ["completion"]), "whole"]:
        x = sizes["completion"] if name in shared else sizes[name]
        begin, end = int(x.min()), int(np.percentile(x, 99, method="inverted_cdf")) + 1
        width = max(1, -(-(end - begin) // BARS))
        bars = max(1, -(-(end - begin) // width))
        place = np.minimum((sizes[name] - begin) // width, bars - 1)
        drawn[name] = {"begin": begin, "width": width, "counts": np.bincount(place, minlength=bars).tolist(),
                       "more": int(x.max()) >= begin + bars * width}  # fmt: skip
    return drawn
