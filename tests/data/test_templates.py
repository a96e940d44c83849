import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from halos_pl.data.templates import TEMPLATES, resolve_template

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "C"},
]
REPLY = [{"role": "assistant", "content": " D"}]
ASKED = {
    "tulu2": "<|system|>\nS\n<|user|>\nA\n<|assistant|>\nB</s>\n<|user|>\nC\n<|assistant|>\n",
    "tulu2-halos": "\n<|system|>\nS\n<|user|>\nA\n<|assistant|>\nB\n<|user|>\nC\n<|assistant|>\n",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
    "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n",
    "plain": "S\n\nA\n\nB\n\nC\n\n",
}
REPLIED = {"tulu2": " D</s>\n", "tulu2-halos": " D", "chatml": " D<|im_end|>\n", "plain": " D"}


@pytest.fixture
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")


def render(tokenizer, name, messages, **options):
    return tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_are_rendered_and_the_reply_follows_its_prompt(tokenizer, name):
    assert render(tokenizer, name, CHAT, add_generation_prompt=True) == ASKED[name]
    assert render(tokenizer, name, CHAT + REPLY) == ASKED[name] + REPLIED[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_are_refused_and_not_dropped(tokenizer, name):
    with pytest.raises(Exception, match="no place for tools"):
        render(tokenizer, name, CHAT, tools=[{"name": "f"}])
    with pytest.raises(Exception, match="no place for tools"):
        render(tokenizer, name, [*CHAT, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}])


def test_a_template_is_a_name_a_file_jinja_or_the_tokenizers_own(tokenizer, tmp_path):
    jinja = "{{ messages[0].content }}"
    (tmp_path / "mine.jinja").write_text(jinja)
    assert resolve_template(None, tokenizer) is None
    assert resolve_template("tulu2", tokenizer) == TEMPLATES["tulu2"]
    assert resolve_template(str(tmp_path / "mine.jinja"), tokenizer) == jinja
    assert resolve_template(jinja, tokenizer) == jinja
    tokenizer.chat_template = jinja
    assert resolve_template(None, tokenizer) == jinja


def test_unknown_templates_are_named(tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown chat template 'tulu' \(did you mean 'tulu2'\?\); expected tulu2, tulu2-halos"
    ):
        resolve_template("tulu", tokenizer)
    with pytest.raises(ValueError, match=r"none.jinja': no such file"):
        resolve_template(str(tmp_path / "none.jinja"), tokenizer)
