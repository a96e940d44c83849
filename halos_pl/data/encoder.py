"""The encoder that options and a model ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import DataNeeds
from halos_pl.data.records import DataError
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.tokenizers import load_tokenizer


def make_encoder(options: Mapping[str, Any], needs: DataNeeds) -> CompletionTokenizer:
    """The encoder of a data module with these options, for a model with these needs.

    Raises:
        DataError: no tokenizer, one with more tokens than the model's head has rows, or a reference with another one.
        ValueError: as `CompletionTokenizer` does.
    """
    name = options["tokenizer_name"] or needs.tokenizer
    try:
        tokenizer = load_tokenizer(name, needs.trust_remote_code)
    except ValueError as error:
        raise DataError(f"{error}; name one with --model.tokenizer") from error
    if len(tokenizer) > needs.vocab_size:
        raise DataError(
            f"the tokenizer {name!r} has {len(tokenizer)} tokens, more than the {needs.vocab_size} rows of the model's "
            "head; take the tokenizer that belongs to the model"
        )
    _compare(tokenizer, needs)
    max_length, max_prompt_length = options["max_length"], options["max_prompt_length"]
    if needs.max_positions is not None and max_length > needs.max_positions:
        rank_zero_info(f"max_length {max_length} is cut to the model's {needs.max_positions} positions")
        max_length = needs.max_positions
        if max_prompt_length is not None:
            max_prompt_length = min(max_prompt_length, max_length // 2)
    return CompletionTokenizer(
        tokenizer,
        chat_template=options["chat_template"],
        eos_token=options["eos_token"],
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        control=needs.control,
        special_tokens=options["special_tokens"],
    )


def _compare(tokenizer: PreTrainedTokenizerBase, needs: DataNeeds) -> None:
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
