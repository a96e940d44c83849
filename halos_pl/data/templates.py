r"""Chat templates by name, for tokenizers that bring none.

| name          | a turn                                           | what asks for the reply   |
|---------------|--------------------------------------------------|---------------------------|
| `tulu2`       | `<|role|>\n` content (assistant: EOS) `\n`       | `<|assistant|>\n`         |
| `tulu2-halos` | `\n<|role|>\n` content (the KTO paper's variant) | `\n<|assistant|>\n`       |
| `chatml`      | `<|im_start|>` role `\n` content `<|im_end|>\n`  | `<|im_start|>assistant\n` |
| `plain`       | content, with an empty line between turns        | an empty line             |

All take every role (system included) and several turns. They have no place for tools and refuse them.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from halos_pl.data.records import nearest


def _template(turn: str, reply: str) -> str:
    refuse = "{{ raise_exception('this chat template has no place for tools') }}"
    return (
        f"{{% if tools %}}{refuse}{{% endif %}}"
        f"{{% for message in messages %}}{{% if message.tool_calls %}}{refuse}{{% endif %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {reply} }}}}{{% endif %}}"
    )


TEMPLATES = {
    "tulu2": _template(
        r"{{ '<|' + message.role + '|>\n' + message.content }}"
        r"{{ (eos_token if message.role == 'assistant' else '') + '\n' }}",
        r"'<|assistant|>\n'",
    ),
    "tulu2-halos": _template(r"{{ '\n<|' + message.role + '|>\n' + message.content }}", r"'\n<|assistant|>\n'"),
    "chatml": _template(
        r"{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}",
        r"'<|im_start|>assistant\n'",
    ),
    "plain": _template(r"{{ ('' if loop.first else '\n\n') + message.content }}", r"'\n\n'"),
}


def resolve_template(template: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The Jinja text of a template given by its name, as a `.jinja` file or as Jinja; None is the tokenizer's own.

    Returns:
        The text, or None where the tokenizer has no template either; it can encode plain records only.

    Raises:
        ValueError: an unknown name, a file that is not there.
    """
    if template is None:
        return tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{{" in template or "{%" in template:
        return template
    if Path(template).suffix in (".jinja", ".jinja2", ".j2"):
        path = Path(template).expanduser()
        if not path.is_file():
            raise ValueError(f"chat template {template!r}: no such file")
        return path.read_text(encoding="utf-8")
    raise ValueError(
        f"unknown chat template {template!r}{nearest(template, TEMPLATES)}; expected {', '.join(TEMPLATES)}, "
        "or a Jinja file named *.jinja"
    )
