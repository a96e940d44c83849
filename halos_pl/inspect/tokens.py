"""What tokens say that sizes do not: special tokens inside prompts, and completions that begin with their prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from halos_pl.data.store import Corpus
from halos_pl.data.tokenization import CompletionTokenizer

Index = NDArray[np.int64]
Bools = NDArray[np.bool_]
WINDOW = 16  # tokens of a prompt at the beginning of a completion that make a repetition; a power of two
LEAST = 4  # tokens of a prompt that a completion can be said to repeat
_FACTOR = 0x9E3779B97F4A7C15


class Lists:
    """Token lists of a block, one after the other: the i-th is `values[begin[i] : end[i]]`."""

    def __init__(self, offsets: Index, values: NDArray[np.int32]) -> None:
        self.begin, self.end, self.values = offsets[:-1], offsets[1:], values

    @property
    def size(self) -> Index:
        return self.end - self.begin

    def at(self, place: int, fill: int = -1) -> NDArray[np.int32]:
        """The token at this place of each list, `fill` where it is shorter."""
        there = self.size > place
        padded = np.append(self.values, np.int32(fill))
        return padded[np.where(there, self.begin + place, len(self.values))]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that stand for no text: BOS, EOS, roles of a chat."""
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


def specials_in_prompts(corpus: Corpus, encoder: CompletionTokenizer) -> Index:
    """Special tokens of each record's prompt, without the BOS that opens it, int64 [records]."""
    ids = sorted(special_ids(encoder.tokenizer))
    found = [np.empty(0, np.int64)]
    for block in _blocks(corpus):
        prompt = block["prompt"]
        body = _body(prompt, encoder)
        upto = np.concatenate([[0], np.cumsum(np.isin(prompt.values, ids))])
        found.append(upto[prompt.end] - upto[body])
    return np.concatenate(found)


def repeats_prompt(corpus: Corpus, encoder: CompletionTokenizer) -> tuple[Bools, Bools]:
    """Whether the first and the second completion of each record begin with words of their prompt: with the whole
    prompt (from 4 tokens on), or with 16 tokens that stand somewhere in it. The first token, which a space before it
    changes, is not compared. bool [records] each."""
    found: dict[str, list[Bools]] = {"first": [np.empty(0, bool)], "second": [np.empty(0, bool)]}
    for block in _blocks(corpus):
        prompt = block["prompt"]
        body = _body(prompt, encoder)
        for name, parts in found.items():
            parts.append(_opens(prompt, body, block[name]) | _quotes(prompt, block[name]))
    return np.concatenate(found["first"]), np.concatenate(found["second"])


def _blocks(corpus: Corpus) -> Iterator[dict[str, Lists]]:
    for path in corpus.paths:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        columns = {name: batch.column(name) for name in ("prompt", "first", "second")}
        yield {name: Lists(x.offsets.to_numpy(), x.values.to_numpy()) for name, x in columns.items()}


def _body(prompt: Lists, encoder: CompletionTokenizer) -> Index:
    """Where each prompt begins, after the BOS (or, without one, the EOS) that the tokenizer put there."""
    lead = list(encoder.truncation.lead)
    led = _starts_with(prompt, lead)
    body = prompt.begin + len(lead) * led
    alone = (prompt.size == 1) & (prompt.at(0) == encoder.eos_token_id)
    return np.where(alone, prompt.end, body)


def _starts_with(lists: Lists, ids: Iterable[int]) -> Bools:
    same = np.ones(len(lists.begin), bool)
    for place, id in enumerate(ids):
        same &= lists.at(place) == id
    return same


def _opens(prompt: Lists, body: Index, completion: Lists) -> Bools:
    """Whether the completion goes on after the whole prompt, both from their second token on."""
    size = prompt.end - body
    out = (size >= LEAST) & (completion.size - 1 >= size)
    rows = np.flatnonzero(out)
    for place in range(1, LEAST):  # most differ soon
        same = completion.values[completion.begin[rows] + place] == prompt.values[body[rows] + place]
        out[rows[~same]] = False
        rows = rows[same]
    if not len(rows):
        return out
    sizes = size[rows] - 1
    starts = np.cumsum(sizes) - sizes
    within = np.arange(int(sizes.sum())) - np.repeat(starts, sizes)
    left = completion.values[np.repeat(completion.begin[rows] + 1, sizes) + within]
    right = prompt.values[np.repeat(body[rows] + 1, sizes) + within]
    out[rows] = np.logical_and.reduceat(left == right, starts)
    return out


def _quotes(prompt: Lists, completion: Lists) -> Bools:
    """Whether tokens 1 to 16 of the completion stand in its prompt one after the other."""
    out = np.zeros(len(prompt.begin), bool)
    able = (completion.size > WINDOW + 1) & (prompt.size >= WINDOW)
    if not able.any():
        return out
    windows, wanted = _digests(prompt.values), np.zeros(len(out), np.uint64)
    wanted[able] = _digests(completion.values)[completion.begin[able] + 1]
    row = np.repeat(np.arange(len(out)), prompt.size)
    base = int(prompt.begin[0]) if len(prompt.begin) else 0
    places = np.arange(len(row)) + base
    inside = able[row] & (places + WINDOW <= prompt.end[row])
    places, row = places[inside], row[inside]
    out[row[windows[places] == wanted[row]]] = True
    return out


def _digests(values: NDArray[Any]) -> NDArray[np.uint64]:
    """A digest of the 16 values from each place on; those of the last places are cut short."""
    digest, width, factor = values.astype(np.uint64), 1, _FACTOR
    while width < WINDOW:
        later = np.zeros_like(digest)
        later[:-width] = digest[width:]
        with np.errstate(over="ignore"):
            digest = digest + later * np.uint64(factor)
        width, factor = 2 * width, factor * factor % 2**64
    return digest
