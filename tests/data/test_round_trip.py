"""Every row of the real data comes back from its tokens, and a template's text is what the tokens say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halos_pl.data.records import DataError, Origin, Paired, Record, Unpaired
from halos_pl.data.sources import load_records
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.tokenizers import load_tokenizer

FILES = (
    "binary/blimp_acceptability.jsonl",
    "binary/chat_kto_en.jsonl",
    "paired/blimp_prefix.jsonl",
    "paired/chat_dpo_en.jsonl",
    "paired/hh_format_helpful.jsonl",
    "sft/gsm8k_train_2000.jsonl",
    "sft/helpful_multi_turn.jsonl",
    "sft/oasst_single_turn.jsonl",
    "sft/self_instruct_seed.jsonl",
)
GPT2, STORIES = "tokenizers/gpt2", "models/stories260K"


def completions(record: Record) -> list[object]:
    return [record.chosen, record.rejected] if isinstance(record, Paired) else [record.completion]


def rendered(encoder: CompletionTokenizer, record: Record) -> Iterator[tuple[str, str]]:
    """What the template makes of the whole row, with its prompt apart."""
    for reply in completions(record):
        if isinstance(record.prompt, str):
            yield record.prompt, f"{record.prompt}{reply}"
            continue
        said = encoder.tokenizer.apply_chat_template
        whole = said(record.prompt + reply, record.tools, tokenize=False)  # type: ignore[operator]
        yield said(record.prompt, record.tools, add_generation_prompt=True, tokenize=False), whole


def check(encoder: CompletionTokenizer, records: list[Record]) -> int:
    """Ids of prompt and completion decode to the rendered text, with BOS once before it and EOS once after it."""
    bos, eos, end = encoder.tokenizer.bos_token_id, encoder.eos_token_id, encoder.tokenizer.eos_token
    rows = 0
    for record, ids in zip(records, encoder.encode_records(records), strict=True):
        assert not isinstance(ids, DataError), ids
        for (before, whole), completion in zip(rendered(encoder, record), ids.completions, strict=True):
            assert completion[-1] == eos
            assert eos not in completion[:-1]
            assert completion[:-1], "something is scored beside EOS"
            opened = ids.prompt[0] in (bos, eos)
            assert opened or encoder.tokenizer.bos_token_id is None or before
            text = whole.rstrip().removesuffix(end) if whole.rstrip().endswith(end) else whole
            got = encoder.tokenizer.decode([*ids.prompt[opened:], *completion[:-1]], clean_up_tokenization_spaces=False)
            assert got == text
            rows += 1
    return rows


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("kind", "template"), [("gpt2", "chatml"), ("byte-level", "tulu2")])
def test_byte_level_tokens_say_what_the_template_says(
    name: str, kind: str, template: str, shared_data: Path, tiny_model: Path
) -> None:
    tokenizer = load_tokenizer(str(shared_data / GPT2) if kind == "gpt2" else str(tiny_model))
    records = load_records(str(shared_data / name)).records
    encoder = CompletionTokenizer(tokenizer, chat_template=template, max_length=10**6, special_tokens="allow")
    assert check(encoder, records) >= len(records)


@pytest.mark.parametrize("name", FILES)
def test_sentencepiece_tokens_say_what_the_template_says(name: str, shared_data: Path) -> None:
    """stories260K has bytes for what it has no piece for: nothing is lost with it either, but a dummy space."""
    tokenizer = load_tokenizer(str(shared_data / STORIES))
    records = load_records(str(shared_data / name)).records
    encoder = CompletionTokenizer(tokenizer, chat_template="plain", max_length=10**6)
    for record, ids in zip(records, encoder.encode_records(records), strict=True):
        assert not isinstance(ids, DataError), ids
        for (before, whole), completion in zip(rendered(encoder, record), ids.completions, strict=True):
            assert ids.prompt[0] == 1
            assert completion[-1] == 2
            together = tokenizer.decode([*ids.prompt[1:], *completion[:-1]], clean_up_tokenization_spaces=False)
            assert together.removeprefix(" ") == whole.removesuffix("</s>").removeprefix(" "), (before, whole)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<"), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, reply=TEXT.filter(str.strip), turns=st.integers(0, 2), most=st.integers(4, 60))
def test_no_completion_token_is_lost_and_no_prompt_token_scored(
    prompt: str, reply: str, turns: int, most: int, tiny_model: Path
) -> None:
    encoder = CompletionTokenizer(load_tokenizer(str(tiny_model)), chat_template="chatml", max_length=most)
    said = [{"role": role, "content": prompt} for _ in range(turns) for role in ("user", "assistant")]
    asked = [*said, {"role": "user", "content": prompt}]
    for record in (
        Unpaired(prompt, reply, True, Origin("f", 1)),
        Unpaired(asked, [{"role": "assistant", "content": reply}], True, Origin("f", 1)),
    ):
        (whole,) = encoder.encode_records([record])
        assert not isinstance(whole, DataError)
        cut = encoder.encode(record.prompt, record.completion, origin=record.origin)
        assert cut.completion.tolist() == whole.completions[0][: len(cut.completion)], "the completion's start stays"
        assert len(cut.prompt) + len(cut.completion) <= most
        assert len(cut.completion) >= 1
        if not cut.truncated_completion:
            assert cut.completion[-1] == encoder.eos_token_id
        text = encoder.tokenizer.decode(whole.completions[0][:-1])
        assert text == (reply if isinstance(record.prompt, str) else f"{reply}<|im_end|>\n")
        assert np.isin(cut.prompt, whole.prompt).all()


def test_a_reply_that_writes_the_users_turn_itself_is_found(shared_data: Path) -> None:
    """Row 199 of the real thumbs goes on with `<|user|>` and a turn of the user's: in Tulu's template, an injection."""
    encoder = CompletionTokenizer(load_tokenizer(str(shared_data / GPT2)), chat_template="tulu2", max_length=10**6)
    records = load_records(str(shared_data / "binary/chat_kto_en.jsonl")).records
    refused = [str(x) for x in encoder.encode_records(records) if isinstance(x, DataError)]
    assert len(refused) == 1
    assert "chat_kto_en.jsonl:199: completion[0].content: the control token '<|user|>' at character 1811" in refused[0]


def test_the_files_are_all_of_them(shared_data: Path) -> None:
    found = {
        str(x.relative_to(shared_data)) for part in ("binary", "paired", "sft") for x in (shared_data / part).iterdir()
    }
    assert found == set(FILES)
    assert all(json.loads(line) for line in (shared_data / FILES[0]).read_text("utf-8").splitlines())
