"""Stories are written and understood by the same grammar; what is not one is refused."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from itertools import combinations

import pytest

from halos_pl.nano.grammar import ANIMALS, NAMES, WORLD, Dice, Story, read, write

STORY = "On Sunday the fog came. Mia the shy fox found a red hat. Then Mia met an owl. The fox fell asleep."


def stories(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    dice = Dice(seed)
    heroes = [(dice.pick(NAMES), dice.pick(ANIMALS)) for _ in range(count)]
    return [(name, animal, write(dice, name, animal)) for name, animal in heroes]


def test_a_story_says_what_it_says() -> None:
    traits = {"day": "Sunday", "weather": "fog", "colour": "red", "friend": "owl", "ending": "sleepy"}
    assert read(STORY) == Story("Mia", "fox", traits)
    assert read(f"  {STORY}\n") == read(STORY)


def test_what_is_written_is_understood() -> None:
    for name, animal, text in stories(2000):
        story = read(text)
        assert story is not None, text
        assert (story.name, story.animal) == (name, animal)
        assert set(story.traits) == set(WORLD)


def test_given_traits_are_kept() -> None:
    dice = Dice(1)
    for trait, values in WORLD.items():
        for value in values:
            story = read(write(dice, "Tom", "hen", {trait: value}))
            assert story is not None
            assert story.traits[trait] == value


def test_traits_are_drawn_alike_and_independently() -> None:
    n = 12_000
    found = [story.traits for _, _, text in stories(n) if (story := read(text))]
    for trait, values in WORLD.items():
        counts = Counter(x[trait] for x in found)
        assert set(counts) == set(values)
        assert all(abs(count - n / 6) < 5 * (n * 5 / 36) ** 0.5 for count in counts.values())
    for first, second in combinations(WORLD, 2):
        counts2 = Counter((x[first], x[second]) for x in found)
        assert sum((count - n / 36) ** 2 / (n / 36) for count in counts2.values()) < 36 + 6 * 72**0.5


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "Mia",
        STORY[:-1],
        STORY.replace("Then Mia", "Then Tom"),  # another hero
        STORY.replace("The fox fell", "The hen fell"),
        STORY.replace("shy", "shyy"),
        STORY.replace(" Then Mia met an owl.", ""),
        STORY.replace("an owl", "an owl and a bee"),
        STORY.replace(". Then", ".Then"),
        STORY + " The end.",
        STORY + " " + STORY,
        "Well. " + STORY,
        STORY.replace("found a red hat", "saw a red hat"),  # a mixture of two sentences
        STORY.lower(),
        STORY.replace("On Sunday the fog came. ", "") + " On Sunday the fog came.",
    ],
)
def test_what_is_no_story_is_refused(broken: str) -> None:
    assert read(broken) is None


def test_no_phrase_has_two_meanings() -> None:
    phrases = [phrase for values in WORLD.values() for said in values.values() for phrase in said]
    assert len(phrases) == len(set(phrases))


def test_stories_are_the_same_on_every_machine() -> None:
    text = "\n".join(text for *_, text in stories(200, seed=7))
    assert sha256(text.encode()).hexdigest() == "7e75575a432416688819b422ddac1438f244a5dca39c5ca7a1c2fc5b43f3cf78"
