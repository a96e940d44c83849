"""Tokenization: prompt and completion as token ids that nothing merges, doubles or loses between them.

The prompt becomes what generation will see: its own tokens, with the tokenizer's BOS once and no EOS. The completion is
tokenized alone, as the text that goes on after the prompt (no special tokens, no dummy prefix space), and ends with EOS
once. So the model is scored on the very tokens that it would have to produce.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from halos_pl.data.control import Control
from halos_pl.data.records import BadRows, Message, OnBadRow, Origin, Text, Unpaired
from halos_pl.data.templates import TEMPLATES, resolve_template
from halos_pl.data.tokenizers import opening_and_continuation

Tokens = NDArray[np.int32]
Tools = list[Any]
"""JSON schemas of functions, which a chat template shows to the model."""
CHUNK = 1024  # records tokenized at once


@dataclass(frozen=True, slots=True, eq=False)
class Tokenized:
    """Token ids of a prompt and its completion (with EOS, unless its end was cut off)."""

    prompt: Tokens
    completion: Tokens
    truncated_prompt: bool
    truncated_completion: bool


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A tokenized record. Equal keys mean equal raw prompts (with tools) or completions, whatever was cut off."""

    prompt: Tokens
    completion: Tokens
    desirable: bool | None
    prompt_key: bytes
    completion_key: bytes
    origin: Origin
    score: float | None = None


@dataclass(frozen=True)
class TruncationReport:
    """How many rows were longer than `max_length`, and where they were cut (a row may be cut at both places)."""

    rows: int
    truncated: int
    prompts: int
    completions: int

    def __str__(self) -> str:
        return (
            f"{self.truncated} of {self.rows} rows were truncated "
            f"({self.prompts} prompts cut on the left, {self.completions} completions cut at the end)"
        )


@dataclass(frozen=True)
class Encoded:
    """One entry a record, in their order: its example, or None where the record is bad."""

    examples: list[Example | None]
    bad: list[str]
    truncation: TruncationReport


class _Rendered(NamedTuple):
    prompt: str
    completion: str
    control: list[int]  # ids that end the prompt


class CompletionTokenizer:
    """Encodes prompts and completions.

    Args:
        tokenizer: a fast tokenizer. The chat template and EOS given here, and a pad token where it has none, are set on
            it too, so that the exported tokenizer agrees with the training.
        chat_template: for conversational records, as `resolve_template` takes it; default: the tokenizer's own.
        eos_token: the token that ends a completion; default: the tokenizer's.
        max_length: tokens of prompt and completion together. A longer row's prompt is cut on its left (BOS stays) to
            `max_prompt_length` or what the completion leaves free; then the completion is cut at its end.
        max_prompt_length: default: half of `max_length`.
        control: texts that end the prompts of desirable and of undesirable completions, after the template's generation
            prompt. They count as prompt and are never cut off; a completion without a label has none.

    Raises:
        ValueError: a slow tokenizer; no EOS, or one that is not a single token; bad lengths; an unknown template;
            control texts without tokens or with the same.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        eos_token: str | None = None,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        control: tuple[str, str] | None = None,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer, the only kind that is exact here")
        self.tokenizer = tokenizer
        self._opening, self._continuation = opening_and_continuation(backend)
        self._control = Control(control, self._continuation, (tokenizer.bos_token_id, tokenizer.eos_token_id))
        least = 1 + self._control.size
        if max_length < least + 1:
            also = f", and {self._control.size} of control" if control else ""
            expected = f"at least {least + 1}: a token of prompt and of completion{also}"
            raise ValueError(f"max_length is {max_length}; expected {expected}")
        if max_prompt_length is not None and not least <= max_prompt_length < max_length:
            raise ValueError(f"max_prompt_length is {max_prompt_length}; expected {least} to max_length - 1")
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length or max(max_length // 2, least)
        template = resolve_template(chat_template, tokenizer)
        self.chat_template = template and self._control.without(template)  # an exported policy's has the control
        if chat_template is not None or self.chat_template != template:
            tokenizer.chat_template = self.chat_template
        self.eos_token_id = self._set_eos(eos_token)
        self._prefix = self._special_prefix()

    @property
    def sampling_template(self) -> str | None:
        """The chat template with the control of desirable completions at the end of its generation prompt.

        It goes with the exported policy, so that whatever samples from it asks for them. None where there is no
        template or no control.
        """
        if self.chat_template is None or not self._control.size:
            return None
        return self._control.ends(self.chat_template)

    def encode(self, prompt: Text, completion: Text, *, origin: Origin, tools: Tools | None = None) -> Tokenized:
        """Token ids of one row, without control: it has no label.

        Raises:
            DataError: naming the row, where there is no chat template for it, the template fails or rewrites the prompt
                once the completion is there, or no token is left to score.
        """
        rendered = self._render(prompt, completion, origin, tools)
        return self._fit(*next(self._ids([rendered])), origin)

    def encode_prompt(self, prompt: Text, *, origin: Origin, tools: Tools | None = None) -> Tokens:
        """Token ids that a (desirable) completion follows: those that training has before it, cut on the left to what
        `max_length` leaves beside one token.

        Raises:
            DataError: naming the row, where there is no chat template for it, or the template fails.
        """
        text = prompt if isinstance(prompt, str) else self._apply(prompt, origin, tools, reply=True)
        ids = self._opened(self._opening.encode(text, add_special_tokens=False).ids)
        control = self._control.ids[True]
        return np.array(self._cut(ids, self.max_length - 1 - len(control)) + control, np.int32)

    def examples(self, records: Sequence[Unpaired], *, on_bad_row: OnBadRow = "error") -> Encoded:
        """Examples of all records, tokenized in chunks by all cores.

        Raises:
            DataError: listing the first ten records that `encode` refuses, unless `on_bad_row` is "skip".
        """
        bad = BadRows(on_bad_row)
        examples: list[Example | None] = [None] * len(records)
        cuts: list[tuple[bool, bool]] = []
        for start in range(0, len(records), CHUNK):
            texts: dict[int, _Rendered] = {}
            for i, record in enumerate(records[start : start + CHUNK], start):
                with bad.caught():
                    text = self._render(record.prompt, record.completion, record.origin, record.tools)
                    texts[i] = text._replace(control=self._control.ids[record.desirable])
            for i, ids in zip(texts, self._ids(list(texts.values())), strict=True):
                with bad.caught():
                    tokens = self._fit(*ids, records[i].origin)
                    cuts.append((tokens.truncated_prompt, tokens.truncated_completion))
                    examples[i] = _example(records[i], tokens)
        bad.finish()
        prompts, completions = (sum(cut[side] for cut in cuts) for side in (0, 1))
        return Encoded(examples, bad.messages, TruncationReport(len(cuts), sum(map(any, cuts)), prompts, completions))

    def _set_eos(self, eos_token: str | None) -> int:
        tokenizer = self.tokenizer
        if (eos := eos_token or tokenizer.eos_token) is None:
            raise ValueError("the tokenizer has no EOS token; name one of its tokens: --data.eos_token TOKEN")
        ids = self._continuation.encode(eos, add_special_tokens=False).ids
        if len(ids) != 1 or self._continuation.id_to_token(ids[0]) != eos:
            raise ValueError(f"eos_token {eos!r} is not one token of the vocabulary; it is tokenized as {ids}")
        tokenizer.eos_token = eos
        if tokenizer.pad_token is None:
            tokenizer.pad_token = eos
        return ids[0]

    def _special_prefix(self) -> list[int]:
        """What the tokenizer puts before a text (BOS, as a rule)."""
        probe = self._opening.encode("a")
        return [id for id, _ in takewhile(lambda x: x[1], zip(probe.ids, probe.special_tokens_mask, strict=True))]

    def _render(self, prompt: Text, completion: Text, origin: Origin, tools: Tools | None) -> _Rendered:
        if isinstance(prompt, str) and isinstance(completion, str):
            return _Rendered(prompt, completion, [])
        if isinstance(prompt, str) or isinstance(completion, str):
            raise origin.error("completion", "of another kind than the prompt", "both plain or both conversational")
        before = self._apply(prompt, origin, tools, reply=True)
        whole = self._apply(prompt + completion, origin, tools, reply=False)
        if not whole.startswith(before):
            wrong = "the chat template rewrites earlier turns (or its generation prompt) once the completion follows"
            expected = "a template that renders prompt + completion as prompt, then completion: --data.chat_template"
            of_csft = "(a policy of CSFT brings one that ends prompts in its control: give the one from before)"
            raise origin.error("completion", wrong, f"{expected} {of_csft}")
        text, eos, rest = whole[len(before) :].rpartition(self.tokenizer.eos_token)
        return _Rendered(before, text + eos + ("" if eos and not rest.strip() else rest), [])

    def _apply(self, messages: list[Message], origin: Origin, tools: Tools | None, *, reply: bool) -> str:
        if self.chat_template is None:
            names = ", ".join(TEMPLATES)
            expected = f"one: --data.chat_template {{{names}}} or FILE.jinja"
            raise origin.error("prompt", "conversational, and the tokenizer has no chat template", expected)
        try:
            text = self.tokenizer.apply_chat_template(messages, tools, add_generation_prompt=reply, tokenize=False)
        except Exception as error:  # a template is a program of the user's: whatever it raises is about this row
            raise origin.error("prompt", f"the chat template fails ({error})", "messages that it can render") from error
        return str(text)

    def _ids(self, texts: Sequence[_Rendered]) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Prompt, control and completion ids: BOS and EOS in their places, nothing cut."""
        prompts = self._opening.encode_batch_fast([x.prompt for x in texts], add_special_tokens=False)
        completions = self._continuation.encode_batch_fast([x.completion for x in texts], add_special_tokens=False)
        for text, before, after in zip(texts, prompts, completions, strict=True):
            if not text.prompt and not text.control:  # the completion itself opens the text
                after = self._opening.encode(text.completion, add_special_tokens=False)
            ended = after.ids[-1:] == [self.eos_token_id]
            yield self._opened(before.ids), text.control, after.ids if ended else [*after.ids, self.eos_token_id]

    def _opened(self, prompt: list[int]) -> list[int]:
        if prompt[: len(self._prefix)] != self._prefix:  # a template may have written BOS
            prompt = self._prefix + prompt
        if not prompt:  # the first token of the completion is predicted from something
            bos = self.tokenizer.bos_token_id
            prompt = [self.eos_token_id if bos is None else bos]
        return prompt

    def _cut(self, prompt: list[int], size: int) -> list[int]:
        """The end of a prompt, its BOS before it."""
        if size >= len(prompt):
            return prompt
        lead = self._prefix or [self.tokenizer.bos_token_id]
        lead = lead[:size] if prompt[: len(lead)] == lead else []
        return lead + prompt[len(prompt) - size + len(lead) :]

    def _fit(self, prompt: list[int], control: list[int], completion: list[int], origin: Origin) -> Tokenized:
        """The truncation rule (see `max_length`)."""
        if completion == [self.eos_token_id]:
            raise origin.error("completion", "no token left to score", "text that the tokenizer does not drop")
        size, whole = len(prompt) + len(control), len(completion)
        if size + whole > self.max_length and size > self.max_prompt_length:
            size = min(size, max(self.max_prompt_length, self.max_length - whole))
        kept, fitting = self._cut(prompt, size - len(control)), completion[: self.max_length - size]
        return Tokenized(
            np.array(kept + control, np.int32),
            np.array(fitting, np.int32),
            len(kept) < len(prompt),
            len(fitting) < whole,
        )


def _example(record: Unpaired, tokens: Tokenized) -> Example:
    prompt_key, completion_key = _key([record.prompt, record.tools]), _key(record.completion)
    keys = prompt_key, completion_key
    return Example(tokens.prompt, tokens.completion, record.desirable, *keys, record.origin, record.score)


def _key(value: object) -> bytes:
    return blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).digest()
