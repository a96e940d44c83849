"""Requests, the verifier, and the corpus whose model can do what is wished and rarely does."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from typing import Any

import pytest

from halos_pl.nano import granted
from halos_pl.nano.grammar import WORLD, read
from halos_pl.nano.wishes import HEEDED, corpus, prompts

STORY = "On Sunday the fog came. Mia the shy fox found a red hat. Then Mia met an owl. The fox fell asleep."
ROW = {"name": "Mia", "animal": "fox", "trait": "weather", "value": "fog"}


@pytest.mark.parametrize(
    ("changed", "completion", "verdict"),
    [
        ({}, STORY, True),
        ({"value": "rain"}, STORY, False),
        ({"trait": "ending", "value": "sleepy"}, STORY, True),
        ({"trait": "friend", "value": "bee"}, STORY, False),
        ({"name": "Tom"}, STORY, False),
        ({"animal": "hen"}, STORY, False),
        ({}, STORY + " fog fog fog", False),
        ({}, "fog", False),
        ({}, "", False),
    ],
)
def test_granted(changed: dict[str, str], completion: str, verdict: bool) -> None:
    assert granted(ROW | changed, completion) is verdict


def test_no_request_comes_twice() -> None:
    rows = prompts(seed=0, count=16 * 16 * 30)
    keys = [(x["name"], x["animal"], x["trait"], x["value"]) for x in rows]
    assert len(set(keys)) == len(keys) == 7680
    assert prompts(seed=0, count=50) == rows[:50]
    assert prompts(seed=1, count=50) != rows[:50]


def test_a_request_names_hero_and_wish() -> None:
    for row in prompts(seed=3, count=500):
        (message,) = row["prompt"]
        words = set(re.findall(r"\w+", message["content"]))
        assert message["role"] == "user"
        assert {row["name"], row["animal"], row["value"]} <= words


def asked(content: str) -> tuple[str, str]:
    """The trait and value that a request or a note names."""
    words = set(re.findall(r"\w+", content))
    ((trait, value),) = [(trait, value) for trait, values in WORLD.items() for value in values if value in words]
    return trait, value


def test_plain_text_keeps_to_its_notes_and_answers_rarely_do() -> None:
    rows: list[dict[str, Any]] = list(corpus(seed=0, count=8000))
    heeded = []
    for row in rows[1::2]:
        request, answer = (message["content"] for message in row["messages"])
        story = read(answer)
        assert story is not None
        assert {story.name, story.animal} <= set(re.findall(r"\w+", request))
        trait, value = asked(request)
        heeded.append(story.traits[trait] == value)
    expected = HEEDED + (1 - HEEDED) / 6
    assert abs(sum(heeded) / 4000 - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5
    notes = 0
    for row in rows[::2]:
        *noted, text = re.split(r"(?=On (?:Mon|Tues|Wednes|Thurs|Fri|Sun)day (?:it|the) )", row["completion"])
        story = read(text)
        assert story is not None
        for note in filter(None, re.split(r"(?<=\.) ", "".join(noted))):
            trait, value = asked(note)
            assert story.traits[trait] == value
            notes += 1
    assert abs(notes / 4000 - 2.5) < 4 * (5 * 0.25 / 4000) ** 0.5


def test_the_corpus_is_the_same_on_every_machine() -> None:
    text = "".join(json.dumps(row) for row in corpus(seed=0, count=500))
    assert sha256(text.encode()).hexdigest() == "22ce0679efe8583b79b77cd367a2117ddbffef5127972c91a3b3e5243c592560"
