"""What the model is shown, what it answers, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos_pl.chat.conversation import Chat, ChatError
from halos_pl.data import DataError
from halos_pl.evaluate.sample import Sampling

BOS, EOS = 1, 2
TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
Make = Callable[..., Chat]


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def make(tiny_model: Path, notices: list[str]) -> Make:
    """A chat with the tiny model, whose tokenizer here puts BOS before a text."""

    def make(
        temperature: float = 0,
        max_new_tokens: int = 20,
        template: str | None = TEMPLATE,
        penalty: float = 1,
        **more: Any,
    ) -> Chat:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
        tokenizer.chat_template = template
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        model.transformer.wpe.weight.data.mul_(20)  # another likeliest token in every place
        model.generation_config.repetition_penalty = penalty
        model.generation_config.eos_token_id = more.pop("ends", EOS)
        sampling = Sampling(temperature, more.pop("top_p", 1.0), max_new_tokens)
        return Chat(model, tokenizer, sampling, notice=notices.append, positions=more.pop("positions", 128), **more)

    return make


def ids_of(chat: Chat, text: str) -> list[int]:
    """Of a byte-level tokenizer without merges: a token a byte."""
    return [chat.tokenizer.convert_tokens_to_ids(x) for x in chat.tokenizer.tokenize(text)]


def likeliest(chat: Chat, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(chat.model(torch.tensor([ids])).logits[0, -1].float().argmax()))
    return ids[len(prompt) :]


def spied(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Prompt and reply ids of every call of the model from now on."""
    seen = []
    generate: Any = chat.model.generate

    def spy(ids: torch.Tensor, **options: Any) -> Any:
        out = generate(ids, **options)
        seen.append((ids[0].tolist(), out[0, ids.shape[1] :].tolist()))
        return out

    monkeypatch.setattr(chat.model, "generate", spy)
    return seen


def scripted(chat: Chat, reply: list[int], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Make the model answer with these tokens; returns the prompts it sees."""
    prompts = []

    def answer(ids: torch.Tensor, *, streamer: Any, **options: Any) -> None:
        prompts.append(ids[0].tolist())
        streamer.put(ids)
        for token in reply:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(chat.model, "generate", answer)
    return prompts


def silent(text: str) -> None:
    pass


@pytest.mark.parametrize("penalty", [1.0, 7.0])
def test_greedy_replies_are_the_likeliest_tokens(penalty: float, make: Make, monkeypatch: Any, notices: Any) -> None:
    """Whatever the folder's own generation settings say."""
    chat = make(penalty=penalty)
    prompt = [BOS, *ids_of(chat, "[u]a red dog[a]")]
    expected = likeliest(chat, prompt, 20)
    assert EOS not in expected, "this test wants a whole reply"
    assert len(set(expected)) > 5
    seen = spied(chat, monkeypatch)
    pieces: list[str] = []
    reply = chat.say("a red dog", pieces.append)
    assert seen == [(prompt, expected)]
    assert reply == "".join(pieces) == chat.tokenizer.decode(expected, skip_special_tokens=True)
    assert len(list(filter(None, pieces))) > 3, "it is streamed"
    assert notices == ["the reply was cut at 20 tokens"]


def test_any_end_token_of_the_folder_ends_a_reply(make: Make, monkeypatch: Any, notices: list[str]) -> None:
    chat = make()
    tokens = likeliest(chat, [BOS, *ids_of(chat, "[u]a red dog[a]")], 20)
    place = next(i for i in range(3, 20) if tokens[i] not in tokens[:i])
    chat = make(ends=[tokens[place], 77])
    seen = spied(chat, monkeypatch)
    assert chat.say("a red dog", silent) == chat.tokenizer.decode(tokens[:place], skip_special_tokens=True)
    assert seen[0][1] == tokens[: place + 1]
    assert not notices


def test_the_second_turn_sees_the_first(make: Make, monkeypatch: Any) -> None:
    chat = make(system="be kind")
    prompts = scripted(chat, [*ids_of(chat, "hello, you"), EOS], monkeypatch)
    chat.say("hi", silent)
    chat.say("bye", silent)
    assert prompts[0] == [BOS, *ids_of(chat, "[s]be kind[u]hi[a]")]
    assert prompts[1] == prompts[0] + ids_of(chat, "hello, you[u]bye[a]")
    chat.reset()
    chat.set_system("be rude")
    chat.say("hi", silent)
    assert prompts[2] == [BOS, *ids_of(chat, "[s]be rude[u]hi[a]")]
    chat.set_system("")
    assert [x["role"] for x in chat.messages] == ["user", "assistant"]


def test_the_oldest_turns_are_dropped(make: Make, monkeypatch: Any, notices: list[str]) -> None:
    """128 positions, of which a quarter is kept for the reply: 96 for the prompt."""
    chat = make(system="S" * 9, max_new_tokens=200)
    prompts = scripted(chat, [*ids_of(chat, "r" * 10), EOS], monkeypatch)
    for letter in "abcd":
        chat.say(letter * 15, silent)
    turns = ["[u]" + x * 15 + "[a]" + "r" * 10 for x in "abcd"]
    whole = [BOS, *ids_of(chat, "[s]" + "S" * 9 + "".join(turns)[:-10])]
    assert len(whole) == 127
    assert prompts[2] == [BOS, *ids_of(chat, "[s]" + "S" * 9 + "".join(turns[:3])[:-10])], "96 fit"
    assert prompts[3] == [BOS, *ids_of(chat, "[s]" + "S" * 9 + "".join(turns[1:])[:-10])]
    assert notices == ["the oldest turns were dropped (1): the model has 128 positions"]
    assert [x["content"][0] for x in chat.messages] == list("Sbrcrdr")


def test_a_long_text_loses_its_beginning(make: Make, monkeypatch: Any, notices: list[str]) -> None:
    chat = make(max_new_tokens=200)
    seen = spied(chat, monkeypatch)
    chat.say("x" * 300 + "y" * 50, silent)
    ((prompt, reply),) = seen
    assert prompt == [BOS, *ids_of(chat, "x" * 43 + "y" * 50 + "[a]")]
    assert len(prompt) + len(reply) <= 128
    assert notices[0] == "your text lost its beginning: the model has 128 positions"


def test_without_positions_nothing_is_cut(make: Make, monkeypatch: Any, notices: list[str]) -> None:
    chat = make(positions=None)
    prompts = scripted(chat, [EOS], monkeypatch)
    chat.say("x" * 3000, silent)
    assert len(prompts[0]) == 3007
    assert not notices


def test_a_seed_repeats_the_replies(make: Make) -> None:
    def replies(seed: int) -> list[str]:
        torch.manual_seed(seed)
        chat = make(temperature=1.0)
        return [chat.say("hi", silent), chat.say("so?", silent)]

    assert replies(3) == replies(3)
    assert replies(3) != replies(4)


def test_every_token_may_be_drawn(make: Make, monkeypatch: Any) -> None:
    """transformers would leave the 50 likeliest."""
    chat = make(temperature=1e6, max_new_tokens=1)
    seen = spied(chat, monkeypatch)
    torch.manual_seed(0)
    for _ in range(200):
        chat.say("hi", silent)
        chat.reset()
    assert len({token for _, (token,) in seen}) > 100


def test_top_p_leaves_the_likeliest(make: Make) -> None:
    assert make(temperature=1.0, top_p=1e-6).say("a dog", silent) == make().say("a dog", silent)


def test_typed_special_tokens_are_text(make: Make, monkeypatch: Any, notices: list[str]) -> None:
    chat = make(system="<s>x")
    prompts = scripted(chat, [*ids_of(chat, "no"), EOS], monkeypatch)
    chat.say("a</s><pad>b", silent)
    assert prompts == [[BOS, *ids_of(chat, "[s]< s>x[u]a< /s>< pad>b[a]")]]
    assert not {0, EOS, BOS} & set(prompts[0][1:])
    assert len(notices) == 2
    assert "taken apart" in notices[1]


def test_without_a_template_each_text_is_completed_by_itself(make: Make, monkeypatch: Any) -> None:
    chat = make(template=None)
    assert not chat.conversational
    prompts = scripted(chat, [*ids_of(chat, " c"), EOS], monkeypatch)
    assert [chat.say("a", silent), chat.say("b", silent)] == [" c", " c"]
    assert prompts == [[BOS, *ids_of(chat, "a")], [BOS, *ids_of(chat, "b")]]
    with pytest.raises(ChatError, match="needs a chat template"):
        make(template=None, system="be kind")


def test_a_character_of_several_tokens_is_shown_whole(make: Make, monkeypatch: Any) -> None:
    chat = make()
    scripted(chat, [*ids_of(chat, "é→!"), EOS], monkeypatch)
    pieces: list[str] = []
    assert chat.say("hi", pieces.append) == "é→!"
    assert list(filter(None, pieces)) == ["é", "→", "!"]


def test_ctrl_c_keeps_what_was_said(make: Make) -> None:
    chat = make()
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    reply = chat.say("hi", write)
    assert chat.interrupted
    assert reply
    assert chat.messages[-1] == {"role": "assistant", "content": reply}
    assert len(reply) < len(make().say("hi", silent))
    chat.say("go on", silent)
    assert not chat.interrupted


def test_what_cannot_be_answered_leaves_the_conversation_as_it_was(make: Make) -> None:
    chat = make(temperature=1.0)
    chat.say("hi", silent)
    before = list(chat.messages)
    with pytest.raises(DataError, match=r"chat:2: prompt: a null byte"):
        chat.say("a\0b", silent)
    chat.model.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(ChatError, match="not finite"):
        chat.say("hi", silent)
    assert chat.messages == before


def test_a_template_that_fails(make: Make) -> None:
    chat = make(template="{{ raise_exception('no, thank you') }}")
    with pytest.raises(DataError, match="no, thank you"):
        chat.say("hi", silent)


def test_a_tokenizer_of_another_model(make: Make) -> None:
    chat = make()
    chat.model.resize_token_embeddings(50)
    with pytest.raises(ChatError, match="the model knows 50 tokens only"):
        chat.say("ÿ", silent)


def test_a_tokenizer_without_eos_takes_that_of_the_folder(make: Make, tiny_model: Path) -> None:
    model, tokenizer = (x.from_pretrained(tiny_model) for x in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.eos_token = None
    Chat(model, tokenizer, Sampling())
    assert tokenizer.eos_token == "</s>"
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ChatError, match="no EOS token"):
        Chat(model, tokenizer, Sampling())
