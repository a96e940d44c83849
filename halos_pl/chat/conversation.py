"""A conversation with a model, which reads the very tokens that training puts before a completion.

What a user types never becomes a special token: a text that spells one, such as `</s>`, gets a space after its first
character, and a notice says so. (Marks of a chat template that are no tokens of their own are text like any other, and
cannot be told apart.)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from halos_pl.data import DataError
from halos_pl.data.records import Message, Origin, Text, parse_prompt
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.truncation import Tokens
from halos_pl.evaluate.sample import Sampling

Write = Callable[[str], None]
UNLIMITED = sys.maxsize
CONTEXT = 16  # tokens of the prompt that a reply is decoded after, so that its first space is kept


class ChatError(ValueError):
    """The conversation cannot begin or go on; the message says why."""


class Chat:
    """A conversation. Without a chat template, every text is completed by itself.

    Args:
        model: answers; its generation settings are replaced.
        tokenizer: of the model, a fast one.
        sampling: how replies are drawn; the noise is torch's; its batch size has no part in it.
        positions: tokens of prompt and reply that the model has places for; None: any number.
        system: message before all turns; needs a chat template.
        notice: told what the user should know.

    Attributes:
        messages: the turns so far that the model still sees, the system message first.
        interrupted: whether Ctrl-C stopped the last reply.

    Raises:
        ChatError: a system message without a chat template, or no token that ends a reply.
        ValueError: a slow tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        positions: int | None = None,
        system: str | None = None,
        notice: Write = lambda text: None,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model.eval(), tokenizer, sampling
        self.positions, self.notice = positions, notice
        self.messages: list[Message] = []
        self.interrupted = False
        self._turns = 0
        self._ends = _end_ids(model, tokenizer)
        model.generation_config = _settings(sampling, self._ends, tokenizer.pad_token_id)
        self._limit = UNLIMITED
        if positions is not None:
            self._limit = positions - max(2, min(sampling.max_new_tokens, positions // 4))
        # one token more than the limit may pass, so that a longer prompt is seen to be one
        self._encoder = CompletionTokenizer(tokenizer, max_length=max(2, self._limit + 2))
        self.conversational = self._encoder.chat_template is not None
        self._special = _special_tokens(tokenizer)
        if system is not None:
            self.set_system(system)

    def set_system(self, text: str) -> None:
        """Replace the system message; an empty text removes it."""
        if not self.conversational:
            raise ChatError("a system message needs a chat template, and the tokenizer has none")
        turns = [x for x in self.messages if x["role"] != "system"]
        self.messages = [{"role": "system", "content": self._typed(text)}] * bool(text) + turns

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = [x for x in self.messages if x["role"] == "system"]

    def say(self, text: str, write: Write) -> str:
        """The reply to a text, which `write` gets piece by piece. Ctrl-C keeps what was said until then.

        Raises:
            DataError: the text or the chat template cannot be used. The conversation stays as it was.
            ChatError: the model cannot take the prompt, or its probabilities are not numbers.
        """
        before = list(self.messages)
        self._turns += 1
        try:
            self.messages.append({"role": "user", "content": self._typed(text)})
            prompt = self._prompt()
            reply = self._generate(prompt, write)
        except (DataError, ChatError):
            self.messages = before
            raise
        self.messages.append({"role": "assistant", "content": self._defused(reply)})
        if not self.conversational:
            self.messages = []
        return reply

    def _typed(self, text: str) -> str:
        defused = self._defused(text)
        if defused != text:
            self.notice("the special tokens in your text were taken apart, so that the model reads them as text")
        return defused

    def _defused(self, text: str) -> str:
        return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def _prompt(self) -> Tokens:
        """Token ids of the conversation, its oldest turns dropped where it is too long."""
        dropped = 0
        while len(ids := self._encode()) > self._limit and self._drop_oldest():
            dropped += 1
        if dropped:
            self.notice(f"the oldest turns were dropped ({dropped}): the model has {self.positions} positions")
        if len(ids) > self._limit:
            self.notice(f"your text lost its beginning: the model has {self.positions} positions")
        if ids.max() >= (known := self.model.get_input_embeddings().num_embeddings):
            raise ChatError(f"the tokenizer gives token {ids.max()}, but the model knows {known} tokens only")
        return ids

    def _encode(self) -> Tokens:
        origin = Origin("chat", self._turns)
        text: Text = self.messages if self.conversational else self.messages[-1]["content"]
        return self._encoder.encode_prompt(parse_prompt({"prompt": text}, origin)[0], origin=origin)

    def _drop_oldest(self) -> bool:
        """Drop the first user's turn and its reply, unless it is the one to reply to."""
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if len(users) < 2:
            return False
        del self.messages[users[0] : users[1]]
        return True

    def _generate(self, prompt: Tokens, write: Write) -> str:
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(self.model.device)
        room = self.sampling.max_new_tokens
        if self.positions is not None:
            room = min(room, self.positions - len(prompt))
        stream = _Stream(self.tokenizer, prompt[-CONTEXT:].tolist(), self._ends, write)
        self.interrupted = False
        try:
            self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, streamer=stream)
        except KeyboardInterrupt:
            self.interrupted = True
            stream.end()
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise ChatError("the model's probabilities are not finite numbers: did its training diverge?") from error
        if not (stream.ended or self.interrupted):
            why = f"at {room} tokens" if room == self.sampling.max_new_tokens else "where the model's positions end"
            self.notice(f"the reply was cut {why}")
        return stream.text


class _Stream(BaseStreamer):
    """Decodes a reply as its tokens come, and hands on each piece that is whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: list[int], ends: list[int], write: Write) -> None:
        self.tokenizer, self.context, self.ends, self.write = tokenizer, context, ends, write
        self.tokens: list[int] | None = None  # none before the prompt, which comes first
        self.ended = False
        self.text = ""
        self._start = len(self._decode(context))

    def put(self, value: Tensor) -> None:
        if self.tokens is None:
            self.tokens = []
            return
        for token in value.tolist():
            self.ended = token in self.ends
            if not self.ended:
                self.tokens.append(token)
        if not (text := self._reply()).endswith("\ufffd"):  # which the next token may complete
            self._show(text)

    def end(self) -> None:
        self._show(self._reply())

    def _reply(self) -> str:
        return self._decode(self.context + (self.tokens or []))[self._start :]

    def _show(self, text: str) -> None:
        self.write(text[len(self.text) :])
        self.text = text

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a reply: the tokenizer's EOS, and those that the model's folder names."""
    known = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = set() if known is None else set(known if isinstance(known, list) else [known])
    if tokenizer.eos_token is None and ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(min(ends))
    if tokenizer.eos_token_id is None:
        raise ChatError("the tokenizer has no EOS token, so that no reply would end")
    return sorted({*ends, int(tokenizer.eos_token_id)})


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _settings(sampling: Sampling, ends: list[int], pad: int | None) -> GenerationConfig:
    """These settings and no others: what a folder's generation_config.json recommends is left out."""
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    return GenerationConfig(do_sample=bool(drawn), eos_token_id=ends, pad_token_id=pad, **drawn)
