"""Tokenization: prompt and completion as token ids that nothing merges, doubles or loses between them.

The prompt becomes what generation will see: its own tokens, with the tokenizer's BOS once and no EOS. The completion is
tokenized alone, as the text that goes on after the prompt (no special tokens, no dummy prefix space), and ends with EOS
once. So the model is scored on the very tokens that it would have to produce.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from halos_pl.data.control import Control
from halos_pl.data.messages import brief, count_characters
from halos_pl.data.records import DataError, Message, Origin, Paired, Record, Text, Unpaired
from halos_pl.data.special import ControlTokens
from halos_pl.data.templates import TEMPLATES, resolve_template
from halos_pl.data.tokenizers import opening_and_continuation
from halos_pl.data.truncation import Tokens, Truncation

Tools = list[Any]
"""JSON schemas of functions, which a chat template shows to the model."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokenized:
    """Token ids of a prompt and its completion (with EOS, unless its end was cut off)."""

    prompt: Tokens
    completion: Tokens
    truncated_prompt: bool
    truncated_completion: bool


class Encoded(NamedTuple):
    """Token ids of a whole record, nothing cut: its prompt without control, and its one or two completions."""

    prompt: list[int]
    completions: list[list[int]]


class _Rendered(NamedTuple):
    prompt: str
    completions: list[str]
    opens: bool  # the completion opens the text: nothing is before it, no control either


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
        special_tokens: `refuse` messages and plain completions that contain a control token (see `ControlTokens`; one
            EOS may end a plain completion), or `allow` them: they are tokenized as what they stand for. A plain prompt
            may have them: it may be a rendered template.

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
        special_tokens: Literal["refuse", "allow"] = "refuse",
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer, the only kind that is exact here")
        self.tokenizer = tokenizer
        self._opening, self._continuation = opening_and_continuation(backend)
        self.control = Control(control, self._continuation, (tokenizer.bos_token_id, tokenizer.eos_token_id))
        least = 1 + self.control.size
        if max_length < least + 1:
            also = f", and {self.control.size} of control" if control else ""
            expected = f"at least {least + 1}: a token of prompt and of completion{also}"
            raise ValueError(f"max_length is {max_length}; expected {expected}")
        if max_prompt_length is not None and not least <= max_prompt_length < max_length:
            raise ValueError(f"max_prompt_length is {max_prompt_length}; expected {least} to max_length - 1")
        self.max_length = max_length
        template = resolve_template(chat_template, tokenizer)
        self.chat_template = template and self.control.without(template)  # an exported policy's has the control
        if chat_template is not None or self.chat_template != template:
            tokenizer.chat_template = self.chat_template
        self.eos_token_id = self._set_eos(eos_token)
        self._prefix = self._special_prefix()
        lead = self._prefix or [x for x in (tokenizer.bos_token_id,) if x is not None]
        self.truncation = Truncation(max_length, max_prompt_length or max(max_length // 2, least), lead)
        self.special_tokens = special_tokens
        self._refused = ControlTokens(tokenizer, control or ())

    @property
    def sampling_template(self) -> str | None:
        """The chat template with the control of desirable completions at the end of its generation prompt.

        It goes with the exported policy, so that whatever samples from it asks for them. None where there is no
        template or no control.
        """
        if self.chat_template is None or not self.control.size:
            return None
        return self.control.ends(self.chat_template)

    @cached_property
    def identity(self) -> str:
        """All that the ids of `encode_records` depend on, as a text; lengths are not part of it."""
        ids = [self.eos_token_id, self.tokenizer.bos_token_id, self.control.ids[True], self.control.ids[False]]
        names = self.tokenizer.special_tokens_map
        today = str(date.today()) if "strftime_now" in (self.chat_template or "") else None  # it writes the date
        how = [self._opening.to_str(), ids, names, self.chat_template, self.special_tokens, today]
        return json.dumps(how, default=str)

    def encode(self, prompt: Text, completion: Text, *, origin: Origin, tools: Tools | None = None) -> Tokenized:
        """Token ids of one row, cut to `max_length`, without control: it has no label.

        Raises:
            DataError: naming the row, where there is no chat template for it, the template fails or rewrites the prompt
                once the completion is there, a text has a control token in it, or no token is left to score.
        """
        (whole,) = self.encode_records([Unpaired(prompt, completion, None, origin, tools)])
        if isinstance(whole, DataError):
            raise whole
        before, after = np.array(whole.prompt, np.int32), np.array(whole.completions[0], np.int32)
        kept, fitting = map(int, self.truncation.sizes(len(before), len(after)))
        return Tokenized(
            self.truncation.prompt(before, kept), after[:fitting], kept < len(before), fitting < len(after)
        )

    def encode_prompt(self, prompt: Text, *, origin: Origin, tools: Tools | None = None) -> Tokens:
        """Token ids that a (desirable) completion follows: those that training has before it, cut on the left to what
        `max_length` leaves beside one token.

        Raises:
            DataError: naming the row, where there is no chat template for it, the template fails, or a message has a
                control token in it.
        """
        self._check("prompt", prompt, origin)
        text = prompt if isinstance(prompt, str) else self._apply(prompt, origin, tools, reply=True)
        ids = np.array(self._opened(self._opening.encode(text, add_special_tokens=False).ids), np.int32)
        control = np.array(self.control.ids[True], np.int32)
        return np.concatenate([self.truncation.prompt(ids, self.max_length - 1 - len(control)), control])

    def encode_records(self, records: Sequence[Record]) -> list[Encoded | DataError]:
        """Ids of all records, by all cores, nothing cut: BOS and EOS in their places, no control. A DataError stands
        for a record that `encode` refuses."""
        rendered: list[_Rendered | DataError] = []
        for record in records:
            try:
                rendered.append(self._render(record))
            except DataError as error:
                rendered.append(error)
        ids = self._ids([x for x in rendered if not isinstance(x, DataError)])
        return [
            x if isinstance(x, DataError) else self._checked(next(ids), record)
            for x, record in zip(rendered, records, strict=True)
        ]

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

    def _render(self, record: Record) -> _Rendered:
        if isinstance(record, Paired):
            members, labelled = {"chosen": record.chosen, "rejected": record.rejected}, True
        else:
            members, labelled = {"completion": record.completion}, record.desirable is not None
        self._check("prompt", record.prompt, record.origin)
        for key, text in members.items():
            self._check(key, text, record.origin)
        prompt = record.prompt
        if isinstance(prompt, str):
            plain = [x for x in members.values() if isinstance(x, str)]
            if len(plain) < len(members):
                raise record.origin.error("completion", "of another kind than the prompt", "both plain or both chats")
            return _Rendered(prompt, plain, not prompt and not (labelled and self.control.size))
        before = self._apply(prompt, record.origin, record.tools, reply=True)
        return _Rendered(before, [self._reply(before, prompt, x, record) for x in members.values()], False)

    def _check(self, key: str, text: Text, origin: Origin) -> None:
        """Nobody's words may be read as the template's."""
        if self.special_tokens == "allow" or (isinstance(text, str) and key == "prompt"):
            return
        if isinstance(text, str):
            parts = [(key, text.rstrip().removesuffix(self.tokenizer.eos_token))]
        else:
            parts = [(f"{key}[{i}].content", message["content"]) for i, message in enumerate(text)]
        for where, part in parts:
            if found := self._refused.find(part):
                wrong = f"the control token {found[0]!r} at character {found.start()}"
                raise origin.error(where, wrong, "text without it, or --data.special_tokens allow")

    def _reply(self, before: str, prompt: list[Message], completion: Text, record: Record) -> str:
        origin = record.origin
        if isinstance(completion, str):
            raise origin.error("completion", "of another kind than the prompt", "both plain or both chats")
        whole = self._apply(prompt + completion, origin, record.tools, reply=False)
        if not whole.startswith(before):
            wrong = "the chat template rewrites earlier turns (or its generation prompt) once the completion follows"
            expected = "a template that renders prompt + completion as prompt, then completion: --data.chat_template"
            of_csft = "(a policy of CSFT brings one that ends prompts in its control: give the one from before)"
            raise origin.error("completion", wrong, f"{expected} {of_csft}")
        text, eos, rest = whole[len(before) :].rpartition(self.tokenizer.eos_token)
        return text + eos + ("" if eos and not rest.strip() else rest)

    def _apply(self, messages: list[Message], origin: Origin, tools: Tools | None, *, reply: bool) -> str:
        if self.chat_template is None:
            names = ", ".join(TEMPLATES)
            expected = f"one: --data.chat_template {{{names}}} or FILE.jinja"
            raise origin.error("prompt", "conversational, and the tokenizer has no chat template", expected)
        try:
            text = self.tokenizer.apply_chat_template(messages, tools, add_generation_prompt=reply, tokenize=False)
        except Exception as error:  # a template is a program of the user's: whatever it raises is about this row
            wrong = f"the chat template fails ({brief(' '.join(str(error).split()))})"
            raise origin.error("prompt", wrong, "messages that it can render") from error
        count_characters(text, "prompt, as the chat template renders it", origin)  # keys and its own texts too
        return str(text)

    def _ids(self, texts: Sequence[_Rendered]) -> Iterator[Encoded]:
        """BOS and EOS in their places, nothing cut."""
        prompts = self._opening.encode_batch_fast([x.prompt for x in texts], add_special_tokens=False)
        flat = [y for x in texts for y in x.completions]
        completions = iter(self._continuation.encode_batch_fast(flat, add_special_tokens=False))
        for text, before in zip(texts, prompts, strict=True):
            replies = []
            for reply in text.completions:
                after = next(completions)
                ids = self._opening.encode(reply, add_special_tokens=False).ids if text.opens else after.ids
                replies.append(ids if ids[-1:] == [self.eos_token_id] else [*ids, self.eos_token_id])
            yield Encoded(self._opened(before.ids), replies)

    def _checked(self, encoded: Encoded, record: Record) -> Encoded | DataError:
        if [self.eos_token_id] in encoded.completions:
            return record.origin.error("completion", "no token left to score", "text that the tokenizer does not drop")
        return encoded

    def _opened(self, prompt: list[int]) -> list[int]:
        if prompt[: len(self._prefix)] != self._prefix:  # a template may have written BOS
            prompt = self._prefix + prompt
        if not prompt:  # the first token of the completion is predicted from something
            bos = self.tokenizer.bos_token_id
            prompt = [self.eos_token_id if bos is None else bos]
        return prompt
