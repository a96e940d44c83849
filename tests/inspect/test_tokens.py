"""Completions that begin with their prompt, special tokens in prompts: each against its definition, row by row."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halos_pl.data.tokenization import CompletionTokenizer

TEXT = "It was the best of times"  # 24 tokens


def completion(text: str, prompt: str = TEXT) -> dict[str, Any]:
    return {"prompt": prompt, "completion": text, "label": True}


@pytest.mark.parametrize(
    ("row", "repeats"),
    [
        (completion(TEXT), True),
        (completion(TEXT + ", said he."), True),
        (completion(" t was the best of times"), True),  # the first token does not count
        (completion(TEXT[:-1] + "z"), True),  # 16 tokens are enough
        (completion("?" + TEXT[5:21] + " he said"), True),  # from anywhere in the prompt
        (completion("?" + TEXT[5:20] + "# he said"), False),  # 15 are not
        (completion("??" + TEXT[5:21] + " he said"), False),  # nor later in the completion
        (completion("Once", "Once"), True),
        (completion("Onc", "Onc"), False),  # too short to tell
        (completion("Onze upon", "Once"), False),
        (completion("and so on, the best of times it was"), False),
        (completion("something else", ""), False),
    ],
)
def test_repeated_prompts(inspected: Any, write: Any, row: dict[str, Any], repeats: bool) -> None:
    others = [completion("quite another thing, and longer too", "Begin: "), completion("no", TEXT)]
    _, facts = inspected(write(others[0], row, others[1]))
    assert facts["repeated_prompts"]["rows"] == int(repeats)


def test_repeated_prompts_of_many_rows(inspected: Any, write: Any) -> None:
    """Random texts over two letters, against the definition in plain Python."""
    rng, rows = random.Random(0), []
    for i in range(400):
        prompt = "".join(rng.choices("ab", k=rng.randint(1, 120)))
        begin = rng.randrange(len(prompt)) if i % 2 else 0
        opening = rng.choice("ab") * (i % 2) + prompt[begin : begin + rng.randint(5, 30)]
        rows.append(completion(opening + "".join(rng.choices("ab", k=rng.randint(1, 9))), prompt))

    def repeats(x: str, y: str) -> bool:
        whole = len(x) >= 4 and y[1 : len(x)] == x[1:] and len(y) >= len(x)
        return whole or (len(y) >= 17 and y[1:17] in x)

    expected = sum(repeats(row["prompt"], row["completion"]) for row in rows)
    assert 50 < expected < 350
    assert inspected(write(*rows))[1]["repeated_prompts"]["rows"] == expected


def test_bos_at_the_beginning_is_nobodys_injection(inspected: Any, write: Any) -> None:
    prompts = ("", "<s>hello", "hello", "hello<s>", "a</s>b</s>", "<s><s>hello")
    path = write(*(completion("a reply", x) for x in prompts))
    _, facts = inspected(path)
    assert facts["special_tokens_in_plain_prompts"]["examples"] == [f"{path}:{i}" for i in (4, 5, 6)]


def test_a_chat_has_special_tokens_of_its_template(inspected: Any, write: Any) -> None:
    """The same tokens in a plain prompt may be somebody's own, and where there is a template it could be used."""

    def chat(text: str) -> dict[str, Any]:
        turns = ([{"role": role, "content": x}] for role, x in (("user", text), ("assistant", "fine")))
        return dict(zip(("prompt", "completion"), turns, strict=True)) | {"label": True}

    _, facts = inspected(write(chat("hello"), chat("good day")), "--data.tokenizer", "nano:model")
    assert facts["plain_prompts"] == facts["special_tokens_in_plain_prompts"]["rows"] == 0
    rendered = CompletionTokenizer(AutoTokenizer.from_pretrained(_nano())).tokenizer.apply_chat_template(
        chat("hello")["prompt"], tokenize=False, add_generation_prompt=True
    )
    path = write(completion(" fine", str(rendered)), completion(" fine", "hello"))
    _, plain = inspected(path, "--data.tokenizer", "nano:model")
    assert plain["plain_prompts"] == 2
    assert plain["special_tokens_in_plain_prompts"] == {"rows": 1, "examples": [f"{path}:1"]}
    assert "plain_prompts" in [x["kind"] for x in plain["warnings"]]


def _nano() -> Path:
    from halos_pl.nano.shipped import locate

    return Path(locate("nano:model"))
