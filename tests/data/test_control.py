"""Control tokens: they end the prompt, they are never cut, and sampling asks for the good one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from halos_pl.data.collate import Example
from halos_pl.data.dataset import FeedbackDataset
from halos_pl.data.records import Origin, Unpaired
from halos_pl.data.store import Corpus, Notes, write_block
from halos_pl.data.tokenization import CompletionTokenizer, Encoded
from halos_pl.data.tokenizers import load_tokenizer
from halos_pl.data.views import Members

NANO = Path(__file__).parents[2] / "halos_pl/assets/nano"
CONTROL = ("<|good|>", "<|bad|>")
HERE = Origin("rows.jsonl", 7)
ASK, TELL = {"role": "user", "content": "Tell me of a cat."}, {"role": "assistant", "content": "The cat was happy."}


def characters(tokens: tuple[str, ...] = CONTROL, bos: bool = True, **options: Any) -> CompletionTokenizer:
    """One token a character, so that lengths can be counted by hand; `tokens` are one each, too."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(x, special=True) for x in ("<s>", "</s>", *tokens)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A" if bos else "$A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return CompletionTokenizer(tokenizer, **({"control": CONTROL} | options))


def nano(**options: Any) -> CompletionTokenizer:
    return CompletionTokenizer(load_tokenizer(str(NANO)), **options)


def encoded(encoder: CompletionTokenizer, prompt: Any, completion: Any, desirable: bool | None) -> Example:
    record = Unpaired(prompt, completion, desirable, HERE)
    (ids,) = encoder.encode_records([record])
    assert isinstance(ids, Encoded), ids
    with tempfile.TemporaryDirectory() as folder:
        write_block(path := Path(folder, "block"), [(record, ids)], Notes([], []))
        corpus = Corpus([path])
        everything = Members(np.arange(1), np.zeros(1, np.int8), corpus.label, corpus.score)
        return FeedbackDataset(corpus, everything, encoder).example(0)


def parts(encoder: CompletionTokenizer, prompt: str, completion: str, desirable: bool | None) -> tuple[str, str]:
    example = encoded(encoder, prompt, completion, desirable)
    return encoder.tokenizer.decode(example.prompt), encoder.tokenizer.decode(example.completion)


@pytest.mark.parametrize(("desirable", "ids"), [(True, [6]), (False, [7]), (None, [])])
@pytest.mark.parametrize("chat", [True, False])
def test_the_label_ends_the_prompt(desirable: bool | None, ids: list[int], chat: bool) -> None:
    row: tuple[Any, Any] = ([ASK], [TELL]) if chat else ("a cat", " was happy")
    plain, controlled = encoded(nano(), *row, desirable), encoded(nano(control=CONTROL), *row, desirable)
    assert controlled.prompt.tolist() == [*plain.prompt, *ids]
    assert controlled.completion.tolist() == plain.completion.tolist()
    assert controlled.prompt_key == plain.prompt_key, "y′ and curves go by the raw prompt"
    assert controlled.prompt.dtype == plain.prompt.dtype


def test_an_empty_prompt_is_bos_and_the_control() -> None:
    assert parts(characters(), "", "abc", True) == ("<s><|good|>", "abc</s>")
    assert parts(characters(bos=False), "", "abc", False) == ("<s><|bad|>", "abc</s>")


def test_the_completion_of_an_empty_prompt_goes_on_after_the_control() -> None:
    """A dummy space belongs to the start of a text only, and a completion without control is one."""
    backend = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(["<s>", "</s>", "▁", "a"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken(x, special=True) for x in ("<s>", "</s>", *CONTROL)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    encoder = CompletionTokenizer(tokenizer, control=CONTROL)
    assert encoded(encoder, "", "aa", True).completion.tolist() == [3, 3, 1]
    assert encoded(encoder, "", "aa", None).completion.tolist() == [2, 3, 3, 1]
    assert tokenizer("<s><|good|>aa").input_ids == [*encoded(encoder, "", "aa", True).prompt, 3, 3]


def test_text_without_a_label_has_none() -> None:
    encoder = characters()
    assert encoder.tokenizer.decode(encoder.encode("ab", "c", origin=HERE).prompt) == "<s>ab"


@pytest.mark.parametrize("prompt", ["a cat", "", [ASK], [ASK, TELL, ASK]], ids=repr)
def test_sampling_asks_for_the_good_one(prompt: Any) -> None:
    encoder = nano(control=CONTROL)
    reply = " sat" if isinstance(prompt, str) else [TELL]
    ids = encoder.encode_prompt(prompt, origin=HERE).tolist()
    assert ids == encoded(encoder, prompt, reply, True).prompt.tolist()
    assert ids[-1] == 6


def test_a_control_that_is_no_token_is_its_pieces() -> None:
    assert parts(characters(tokens=()), "ab", "c", False) == ("<s>ab<|bad|>", "c</s>")
    assert len(encoded(characters(tokens=()), "ab", "c", False).prompt) == 3 + len("<|bad|>")


@pytest.mark.parametrize(
    ("prompt", "completion", "options", "expected"),
    [
        ("1234", "abcd", {}, ("<s>1234<|good|>", "abcd</s>")),  # 11 tokens fit
        ("1234567", "abcd", {}, ("<s>4567<|good|>", "abcd</s>")),  # no more than needed is cut
        ("1234567", "abcdefgh", {}, ("<s>567<|good|>", "abcdef")),  # down to half, then the end
        ("1", "abcdefghijkl", {}, ("<s>1<|good|>", "abcdefgh")),  # a short prompt stays
        ("1234567", "abcdefghijkl", {"max_prompt_length": 3}, ("<s>7<|good|>", "abcdefgh")),
        ("1234567", "abcdefghijkl", {"max_prompt_length": 2}, ("<s><|good|>", "abcdefghi")),
        ("1234567", "abcdefghijkl", {"max_length": 3}, ("<s><|good|>", "a")),
    ],
)
def test_truncation_never_cuts_the_control(
    prompt: str, completion: str, options: dict[str, int], expected: tuple[str, str]
) -> None:
    encoder = characters(**({"max_length": 11} | options))
    assert parts(encoder, prompt, completion, True) == expected


def test_a_long_prompt_alone_leaves_room_for_the_control_and_one_token() -> None:
    encoder = characters(max_length=6)
    assert encoder.tokenizer.decode(encoder.encode_prompt("abcdefgh", origin=HERE)) == "<s>fgh<|good|>"


def test_a_short_maximum_keeps_several_pieces() -> None:
    encoder = characters(tokens=(), control=("++", "-"), max_length=4)
    assert parts(encoder, "123", "abc", True) == ("<s>++", "a")
    assert parts(encoder, "123", "abc", False) == ("<s>3-", "a")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"control": ("", "<|bad|>")}, r"control '' is tokenized as nothing"),
        ({"control": ("<|good|>", "<|good|>")}, r"control '<\|good\|>' and '<\|good\|>' are tokenized alike"),
        ({"max_length": 2}, "max_length is 2; expected at least 3: a token of prompt and of completion, and 1 of con"),
        ({"max_prompt_length": 1}, "max_prompt_length is 1; expected 2 to max_length - 1"),
        ({"control": ("++", "--"), "max_length": 3}, "max_length is 3; expected at least 4"),
    ],
)
def test_constructor_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        characters(**options)


@pytest.mark.parametrize("template", [None, "tulu2", "tulu2-halos", "chatml", "plain"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n", "\n  ", "{{ ' ' }}\n"], ids=repr)
def test_the_exported_template_asks_for_the_good_one(template: str | None, end: str) -> None:
    """Jinja drops one newline at a template's end, but not one before what is put after it."""
    plain = nano(chat_template=template)
    assert plain.chat_template is not None
    encoder = nano(chat_template=plain.chat_template + end, control=CONTROL)
    ids = encoder.encode_prompt([ASK], origin=HERE).tolist()
    exported = load_tokenizer(str(NANO))
    exported.chat_template = encoder.sampling_template
    assert exported(exported.apply_chat_template([ASK], add_generation_prompt=True, tokenize=False)).input_ids == ids
    whole = [exported.apply_chat_template([ASK, TELL], tokenize=False)]
    assert whole == [encoder.tokenizer.apply_chat_template([ASK, TELL], tokenize=False)], "nothing else changes"


def test_the_template_takes_any_text() -> None:
    odd = "'\"\\{{ }}%}\n😀é"
    encoder = nano(control=(odd, "-"), chat_template="plain")
    encoder.tokenizer.chat_template = encoder.sampling_template
    assert encoder.tokenizer.apply_chat_template([ASK], add_generation_prompt=True, tokenize=False).endswith(odd)


def test_no_sampling_template_without_control_or_template() -> None:
    assert nano().sampling_template is None
    assert characters().sampling_template is None


def test_an_exported_policy_can_be_trained_on() -> None:
    """Its template ends in the control already: it must not stand there twice."""
    first = nano(control=CONTROL)
    exported = load_tokenizer(str(NANO))
    exported.chat_template = first.sampling_template
    again = CompletionTokenizer(exported, control=CONTROL)
    assert again.sampling_template == first.sampling_template
    for desirable in (True, False):
        ids = [encoded(encoder, [ASK], [TELL], desirable).prompt.tolist() for encoder in (first, again)]
        assert ids[0] == ids[1]


@pytest.mark.parametrize("text", ["<s>", "so </s>"])
def test_a_text_that_begins_or_ends_a_text_is_no_control(text: str) -> None:
    with pytest.raises(ValueError, match="holds the token that begins or ends a text"):
        characters(control=(text, "<|bad|>"))
