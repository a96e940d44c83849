"""Samples against a loop written by hand: no padding, no cache, one prompt at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from halos_pl.evaluate.sample import Sampling, Tokens, sample
from halos_pl.models import ModelError

EOS, PAD = 2, 0
PROMPTS = [np.array(ids, np.int32) for ids in ([1, 40, 41], [1], [1, 9, 9, 9, 77, 8, 30], [1, 40, 41], [5, 6])]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)


def draw(model: PreTrainedModel, how: Sampling, prompts: list[Tokens] = PROMPTS, **options: object) -> list[list[int]]:
    drawn = sample(model, prompts, how, eos_token_id=EOS, pad_token_id=PAD, **options)  # type: ignore[arg-type]
    return [tokens.tolist() for tokens in drawn]


@torch.no_grad()
def by_hand(model: PreTrainedModel, prompt: Tokens, how: Sampling, row: int) -> list[int]:
    """Temperature, nucleus, inverse of the cumulative distribution, as the definitions have them."""
    uniform = np.random.Generator(np.random.Philox(key=[how.seed, row])).random(how.max_new_tokens)
    ids = prompt.tolist()
    for u in uniform:
        logits = model(torch.tensor([ids])).logits[0, -1]
        if how.temperature == 0:
            token = int(logits.argmax())
        else:
            p = (logits / how.temperature).softmax(-1).numpy()
            order = np.argsort(-p)
            kept = order[: int(np.searchsorted(p[order].cumsum(), how.top_p)) + 1]
            p = np.where(np.isin(np.arange(len(p)), kept), p, 0)
            token = int(np.searchsorted(p.cumsum(), u * p.sum(), side="right"))
        ids.append(token)
        if token == EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "how",
    [
        Sampling(max_new_tokens=12),
        Sampling(temperature=0.6, max_new_tokens=12, seed=5),
        Sampling(top_p=0.7, max_new_tokens=12, seed=1),
        Sampling(temperature=0, max_new_tokens=12),
    ],
    ids=str,
)
def test_samples_are_those_of_the_definition(model: PreTrainedModel, how: Sampling) -> None:
    assert draw(model, how) == [by_hand(model, prompt, how, row) for row, prompt in enumerate(PROMPTS)]


def test_batch_and_order_change_nothing(model: PreTrainedModel) -> None:
    whole = draw(model, Sampling(max_new_tokens=10))
    for size in (1, 2, 3):
        assert draw(model, Sampling(max_new_tokens=10, batch_size=size)) == whole
    assert draw(model, Sampling(max_new_tokens=10), PROMPTS[::-1], rows=[4, 3, 2, 1, 0])[::-1] == whole
    assert whole[0] != whole[3], "equal prompts of other rows get noise of their own"
    assert draw(model, Sampling(max_new_tokens=10, seed=1)) != whole


def test_first_tokens_have_the_models_frequencies(model: PreTrainedModel) -> None:
    n, prompt = 4000, PROMPTS[0]
    with torch.no_grad():
        p = model(torch.tensor([prompt.tolist()])).logits[0, -1].softmax(-1)
    counts = Counter(x[0] for x in draw(model, Sampling(max_new_tokens=1, batch_size=1000), [prompt] * n))
    for token, share in enumerate(p.tolist()):
        assert abs(counts[token] - n * share) < 5 * (n * share * (1 - share)) ** 0.5 + 1


def test_a_completion_ends_with_its_first_eos(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] += 0.3
    try:
        drawn = draw(model, Sampling(max_new_tokens=40, temperature=3.0), PROMPTS * 20)
    finally:
        with torch.no_grad():
            model.get_output_embeddings().weight[EOS] -= 0.3
    ended = [x for x in drawn if EOS in x]
    assert ended
    assert all(x.index(EOS) == len(x) - 1 for x in ended)
    assert all(len(x) == 40 for x in drawn if EOS not in x)


def test_the_model_is_left_as_it_was_and_its_own_settings_do_not_matter(model: PreTrainedModel) -> None:
    plain = draw(model, Sampling(max_new_tokens=8))
    before = model.generation_config
    try:
        model.generation_config.update(
            do_sample=True, top_k=1, repetition_penalty=9.0, no_repeat_ngram_size=1, min_new_tokens=8, num_beams=2
        )
        model.train()
        assert draw(model, Sampling(max_new_tokens=8)) == plain
        assert model.training
        assert model.generation_config is before
    finally:
        model.eval()
        model.generation_config.update(
            do_sample=False, top_k=None, repetition_penalty=None, no_repeat_ngram_size=None, min_new_tokens=None
        )
        model.generation_config.num_beams = None


def test_probabilities_that_are_not_numbers_are_refused(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings().weight
    before = head.detach().clone()
    try:
        with torch.no_grad():
            head[7, 0] = float("nan")
        with pytest.raises(ModelError, match="not finite"):
            draw(model, Sampling(max_new_tokens=2))
    finally:
        with torch.no_grad():
            head.copy_(before)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_values_out_of_range(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sampling(**wrong)  # type: ignore[arg-type]
