"""No token lost, doubled or merged between prompt and completion.

The file is long because each boundary rule is tried on each kind of tokenizer that is built here.
"""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from halos_pl.data.records import DataError, Origin, Paired, Unpaired
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.tokenizers import load_tokenizer

HERE = Origin("rows.jsonl", 7)
SENTENCES = ["the cat sat on the mat", "the dog is selling this sketch.", "Once upon a time there was a cat."] * 5
ASK, TELL = {"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat on the mat"}


def fast(backend, bos=True, eos=False):
    """A tokenizer that puts BOS before and EOS after a text, as asked."""
    template = f"{'<s> ' * bos}$A{' </s>' * eos}"
    special = [(x, backend.token_to_id(x)) for x in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def byte_level(vocab_size=400, add_prefix_space=False, **options):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return fast(backend, **options)


def sentencepiece(kind="metaspace"):
    backend = Tokenizer(models.BPE())
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first")])
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    return fast(backend)


def characters(**options):
    """One token a character, so that lengths can be counted by hand."""
    return CompletionTokenizer(byte_level(vocab_size=0, add_prefix_space=False), **options)


def text(encoder, ids):
    return encoder.tokenizer.decode(ids)


@pytest.fixture(params=["byte level", "byte level without BOS", "byte level with prefix space", "metaspace", "prepend"])
def encoder(request):
    made = {
        "byte level": lambda: byte_level(),
        "byte level without BOS": lambda: byte_level(bos=False),
        "byte level with prefix space": lambda: byte_level(add_prefix_space=True),
    }
    return CompletionTokenizer(made.get(request.param, lambda: sentencepiece(request.param))(), chat_template="tulu2")


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("the dog is selling this", " sketch."),
        ("the cat s", "at on the mat"),
        ("the cat ", "sat"),
        ("", "the cat sat"),
    ],
)
def test_the_text_comes_back_and_each_token_is_there_once(encoder, prompt, completion):
    tokens = encoder.encode(prompt, completion, origin=HERE)
    ids = [*tokens.prompt, *tokens.completion]
    assert text(encoder, ids).replace("<s>", "").removesuffix("</s>").lstrip() == prompt + completion
    assert ids.count(encoder.eos_token_id) == 1
    assert ids[-1] == encoder.eos_token_id
    assert ids.count(encoder.tokenizer.bos_token_id) == (1 if encoder._prefix or not prompt else 0)
    assert tokens.prompt.dtype == tokens.completion.dtype == np.int32


def test_the_prompt_is_what_generation_sees(encoder):
    assert encoder.encode("the cat", " sat", origin=HERE).prompt.tolist() == encoder.tokenizer("the cat").input_ids


def test_the_completion_of_an_empty_prompt_opens_the_text(encoder):
    opening = encoder.tokenizer("the cat", add_special_tokens=False).input_ids
    tokens = encoder.encode("", "the cat", origin=HERE)
    assert tokens.prompt.tolist() == [encoder.tokenizer.bos_token_id]
    assert tokens.completion.tolist() == [*opening, encoder.eos_token_id]


def test_an_empty_prompt_without_bos_is_eos():
    tokenizer = byte_level(bos=False)
    tokenizer.bos_token = None
    tokens = CompletionTokenizer(tokenizer).encode("", "the cat", origin=HERE)
    assert tokens.prompt.tolist() == [tokenizer.eos_token_id]


def test_nothing_merges_over_the_boundary():
    vocabulary = {x: i for i, x in enumerate(["<s>", "</s>", "a", "b", "c", "bc"])}
    tokenizer = fast(Tokenizer(models.BPE(vocabulary, [("b", "c")])), bos=False)
    assert tokenizer("abc").tokens() == ["a", "bc"]
    tokens = CompletionTokenizer(tokenizer).encode("ab", "c", origin=HERE)
    assert tokenizer.convert_ids_to_tokens(tokens.prompt) == ["a", "b"]
    assert tokenizer.convert_ids_to_tokens(tokens.completion) == ["c", "</s>"]


def test_eos_of_the_post_processor_or_the_data_is_not_doubled():
    encoder = CompletionTokenizer(byte_level(eos=True), chat_template="tulu2")
    for prompt, completion in (("the cat", " sat"), ("the cat", " sat</s>"), ("<s>the cat", " sat"), ([ASK], [TELL])):
        ids = np.concatenate([(x := encoder.encode(prompt, completion, origin=HERE)).prompt, x.completion]).tolist()
        assert ids.count(encoder.eos_token_id) == 1
        assert ids.count(encoder.tokenizer.bos_token_id) == 1
        assert ids[-1] == encoder.eos_token_id


@pytest.mark.parametrize("name", ["tulu2", "tulu2-halos", "chatml", "plain"])
def test_conversations_are_rendered_once_with_one_bos_and_one_eos(name):
    encoder = CompletionTokenizer(byte_level(), chat_template=name)
    tokens = encoder.encode([ASK], [TELL], origin=HERE)
    asked = encoder.tokenizer.apply_chat_template([ASK], add_generation_prompt=True, tokenize=False)
    assert text(encoder, tokens.prompt) == "<s>" + asked
    end = "<|im_end|>\n" if name == "chatml" else ""
    assert text(encoder, tokens.completion) == f"sat on the mat{end}</s>"


def test_bos_of_the_template_is_not_doubled():
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokens = CompletionTokenizer(byte_level(), chat_template=template).encode([ASK], [TELL], origin=HERE)
    assert tokens.prompt.tolist().count(0) == 1
    assert tokens.completion.tolist().count(1) == 1


def test_the_named_template_and_eos_are_set_on_the_tokenizer():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    encoder = CompletionTokenizer(tokenizer, chat_template="chatml", eos_token="<|im_end|>")
    assert text(encoder, encoder.encode([ASK], [TELL], origin=HERE).completion) == "sat on the mat<|im_end|>"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.eos_token_id == encoder.eos_token_id
    assert tokenizer.chat_template == encoder.chat_template


@pytest.mark.parametrize(
    ("template", "prompt", "completion", "says"),
    [
        (
            None,
            [ASK],
            [TELL],
            "prompt: conversational, and the tokenizer has no chat template; expected one: --data.chat_",
        ),
        ("{{ messages | length }}", [ASK], [TELL], "completion: the chat template rewrites earlier turns"),
        ("{{ raise_exception('no system') }}", [ASK], [TELL], "prompt: the chat template fails (no system)"),
        ("{{ messages[0].content + 3 }}", [ASK], [TELL], "prompt: the chat template fails (can only concatenate"),
        (
            "{{ raise_exception('a\n\t' + 'b' * 999) }}",
            [ASK],
            [TELL],
            f"prompt: the chat template fails (a {'b' * 198}…)",
        ),
        (
            "{{ '\ud800' }}",
            [ASK],
            [TELL],
            "prompt, as the chat template renders it: half a surrogate pair at character 0",
        ),
        (
            "{% for key in messages[0] %}{{ key }}{% endfor %}",
            [ASK | {"\udfff": "x"}],
            [TELL],
            "prompt, as the chat template renders it: half a surrogate pair at character 11",
        ),
        ("{{ 'x' }}", [ASK], [TELL], "completion: no token left to score"),
        (None, "a", "</s>", "completion: no token left to score"),
        (None, "a", [TELL], "completion: of another kind than the prompt"),
    ],
)
def test_errors_name_the_row(template, prompt, completion, says):
    encoder = CompletionTokenizer(byte_level(), chat_template=template)
    with pytest.raises(DataError) as error:
        encoder.encode(prompt, completion, origin=HERE)
    assert str(error.value).startswith(f"rows.jsonl:7: {says}")


def test_tools_reach_the_template():
    template = "{{ tools[0].name }}{% for m in messages %}{{ m.content }}{% endfor %}"
    encoder = CompletionTokenizer(byte_level(), chat_template=template)
    tokens = encoder.encode([ASK], [TELL], origin=HERE, tools=[{"name": "lookup"}])
    assert text(encoder, tokens.prompt) == "<s>lookupthe cat?"


@pytest.mark.parametrize(
    ("prompt", "completion", "options", "expected"),
    [
        ("12345", "abcd", {}, ("<s>12345", "abcd</s>", False, False)),  # 11 tokens fit
        ("1234567", "abcd", {}, ("<s>34567", "abcd</s>", True, False)),  # no more than needed is cut
        ("1234567", "abcdefgh", {}, ("<s>4567", "abcdef", True, True)),  # down to half, then the end
        ("123", "abcdefghij", {}, ("<s>123", "abcdefg", False, True)),  # a short prompt stays
        ("1234567", "abcdefgh", {"max_prompt_length": 2}, ("<s>7", "abcdefgh</s>", True, False)),
        ("1234567", "abcdefgh", {"max_prompt_length": 1}, ("<s>7", "abcdefgh</s>", True, False)),
        ("1234567", "abcdefghijkl", {"max_prompt_length": 1}, ("<s>", "abcdefghij", True, True)),
        ("1234567", "abcdefghijkl", {"max_length": 2}, ("<s>", "a", True, True)),
        ("1234567", "abc", {"max_prompt_length": 2}, ("<s>234567", "abc</s>", True, False)),
    ],
)
def test_truncation_keeps_the_start_of_the_completion(prompt, completion, options, expected):
    encoder = characters(**({"max_length": 11} | options))
    tokens = encoder.encode(prompt, completion, origin=HERE)
    flags = tokens.truncated_prompt, tokens.truncated_completion
    assert (text(encoder, tokens.prompt), text(encoder, tokens.completion), *flags) == expected
    assert len(tokens.prompt) + len(tokens.completion) <= encoder.max_length


def test_truncation_without_bos_keeps_the_end_of_the_prompt():
    encoder = CompletionTokenizer(byte_level(vocab_size=0, bos=False), max_length=4)
    tokens = encoder.encode("1234", "abcd", origin=HERE)
    assert (text(encoder, tokens.prompt), text(encoder, tokens.completion)) == ("34", "ab")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_length": 1}, "max_length is 1; expected at least 2"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0; expected 1 to max_length - 1"),
        ({"max_length": 8, "max_prompt_length": 8}, "max_prompt_length is 8"),
        ({"eos_token": "<|end|>"}, r"eos_token '<\|end\|>' is not one token of the vocabulary; it is tokenized as \["),
        ({"chat_template": "chatlm"}, "did you mean 'chatml'"),
    ],
)
def test_constructor_refuses(options, says):
    with pytest.raises(ValueError, match=says):
        CompletionTokenizer(byte_level(), **options)


def test_constructor_refuses_slow_tokenizers_and_no_eos():
    with pytest.raises(ValueError, match="object is not a fast tokenizer"):
        CompletionTokenizer(object())
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        CompletionTokenizer(tokenizer)


def test_truncation_and_padding_of_the_backend_do_not_leak_in():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    encoder = CompletionTokenizer(tokenizer)
    assert text(encoder, encoder.encode("the cat", " sat on the mat", origin=HERE).completion) == " sat on the mat</s>"


def records():
    tool = [{"name": "f"}]
    template = [("a", "b", True), ("a", "c" * 20, False), ("1" * 20, "b", None), ("", "</s>", True), ("d", "e", True)]
    plain = [Unpaired(p, c, d, Origin("f", i)) for i, (p, c, d) in enumerate(template)]
    chats = [Unpaired([ASK], [TELL], True, Origin("f", 5 + i), tools) for i, tools in enumerate((None, tool))]
    return plain + chats


@pytest.mark.parametrize("prompt", ["the cat", "", "  the", "sat</s>", [ASK], [ASK, TELL, ASK]], ids=repr)
def test_a_prompt_alone_is_the_prompt_of_training(encoder, prompt):
    reply = "on the mat" if isinstance(prompt, str) else [TELL]
    whole = encoder.encode(prompt, reply, origin=HERE)
    assert encoder.encode_prompt(prompt, origin=HERE).tolist() == whole.prompt.tolist()


def test_a_long_prompt_alone_leaves_room_for_one_token():
    encoder = characters(max_length=6)
    assert text(encoder, encoder.encode_prompt("abcdefgh", origin=HERE)) == "<s>efgh"
    assert text(encoder, encoder.encode_prompt("abcd", origin=HERE)) == "<s>abcd"
    with pytest.raises(
        DataError, match=r"rows.jsonl:7: prompt: conversational, and the tokenizer has no chat template"
    ):
        encoder.encode_prompt([ASK], origin=HERE)


def test_records_are_encoded_in_order_with_an_error_for_a_bad_one():
    encoder = characters(max_length=9999, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    encoded = encoder.encode_records(records())
    assert [isinstance(x, DataError) for x in encoded] == [False] * 3 + [True] + [False] * 3
    assert str(encoded[3]).startswith("f:3: completion: no token left to score")
    for record, ids in zip(records(), encoded, strict=True):
        if not isinstance(ids, DataError):
            alone = encoder.encode(record.prompt, record.completion, origin=HERE, tools=record.tools)
            assert ids.prompt == alone.prompt.tolist()
            assert ids.completions == [alone.completion.tolist()]


def test_both_members_of_a_pair_are_encoded_like_single_ones():
    encoder = characters(chat_template="chatml", special_tokens="allow")
    for prompt, chosen, rejected in (("a", "b", "cd"), ([ASK], [TELL], [TELL | {"content": "x"}]), ("", "b", "c")):
        (ids,) = encoder.encode_records([Paired(prompt, chosen, rejected, HERE)])
        single = [encoder.encode(prompt, x, origin=HERE) for x in (chosen, rejected)]
        assert ids.prompt == single[0].prompt.tolist() == single[1].prompt.tolist()
        assert ids.completions == [x.completion.tolist() for x in single]


def test_gpt2_and_sentencepiece_of_real_models(shared_data):
    gpt2 = CompletionTokenizer(load_tokenizer(str(shared_data / "tokenizers/gpt2")))
    tokens = gpt2.encode("Raymond is selling this", " sketch.", origin=HERE)
    assert text(gpt2, tokens.prompt) + text(gpt2, tokens.completion) == "Raymond is selling this sketch.<|endoftext|>"
    assert gpt2.tokenizer.pad_token == "<|endoftext|>"
    assert gpt2.encode("", "Some dog", origin=HERE).prompt.tolist() == [50256]

    stories = CompletionTokenizer(AutoTokenizer.from_pretrained(shared_data / "models/stories260K"))
    vocabulary = stories.tokenizer
    tokens = stories.encode("Once upon", " a time", origin=HERE)
    assert vocabulary.convert_ids_to_tokens(tokens.prompt) == ["<s>", "▁Once", "▁upon"]
    assert vocabulary.convert_ids_to_tokens(tokens.completion) == ["▁a", "▁time", "</s>"]
    assert vocabulary.convert_ids_to_tokens(stories.encode("Once up", "on", origin=HERE).completion) == ["on", "</s>"]
    both = np.concatenate([tokens.prompt, tokens.completion])
    assert vocabulary.decode(both, skip_special_tokens=True) == "Once upon a time"


def test_real_texts_come_back(shared_data):
    encoder = CompletionTokenizer(
        load_tokenizer(str(shared_data / "tokenizers/gpt2")), chat_template="tulu2", max_length=9999
    )
    rows = [json.loads(x) for x in (shared_data / "sft/oasst_single_turn.jsonl").read_text("utf-8").splitlines()]
    made = [Unpaired(x["messages"][:-1], x["messages"][-1:], None, Origin("f", i)) for i, x in enumerate(rows)]
    for record, ids in zip(made, encoder.encode_records(made), strict=True):
        assert text(encoder, ids.completions[0]) == record.completion[0]["content"] + "<|endoftext|>"
