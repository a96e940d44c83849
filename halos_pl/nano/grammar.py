"""The stories: what is written, and what a story that was written says.

A story is four sentences about one hero. Five of its traits, `WORLD`, take one of six values each, drawn
alike and independently, so a story that does not care has a wish about one of them right in a sixth of all cases.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

NAMES = tuple("Mia Tom Ada Ben Zoe Max Lily Sam Ruby Leo Nina Otto Ida Finn Rosa Hugo".split())  # noqa: SIM905
ANIMALS = tuple("fox bear hen pig duck goat lion cat dog horse rabbit sheep cow wolf turtle crab".split())  # noqa: SIM905

WORLD: Mapping[str, Mapping[str, Sequence[str]]] = {
    "day": {x: (f"On {x}",) for x in ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Sunday")},
    "weather": {
        "rain": ("it rained", "the rain fell"),
        "snow": ("it snowed", "the snow fell"),
        "wind": ("it was windy", "the wind blew"),
        "fog": ("it was foggy", "the fog came"),
        "sun": ("it was sunny", "the sun shone"),
        "frost": ("it was frosty", "the frost bit"),
    },
    "colour": {x: (x,) for x in ("red", "blue", "green", "yellow", "white", "black")},
    "friend": {
        "owl": ("an owl",),
        "ant": ("an ant",),
        "frog": ("a frog",),
        "mouse": ("a mouse",),
        "bee": ("a bee",),
        "snail": ("a snail",),
    },
    "ending": {
        "happy": ("was happy", "laughed and danced"),
        "sad": ("was sad", "cried a little"),
        "sleepy": ("was sleepy", "fell asleep"),
        "hungry": ("was hungry", "wanted a big cake"),
        "angry": ("was angry", "stamped and shouted"),
        "proud": ("was proud", "took a deep bow"),
    },
}
"""trait → value → the phrases that say it."""

_SLOTS = {
    "kind": ("little", "merry", "shy", "clever", "brave", "funny", "quiet", "kind"),
    "thing": ("hat", "ball", "kite", "boat", "stone", "cup", "key", "book", "bell", "box", "shoe", "lamp"),
}
_SENTENCES = (
    ("{day} {weather}.",),
    ("{name} the {kind} {animal} found a {colour} {thing}.", "A {kind} {animal} called {name} saw a {colour} {thing}."),
    ("Then {name} met {friend}.", "Soon {friend} came along."),
    ("At last {name} {ending}.", "The {animal} {ending}."),
)
"""One of each line, in this order."""

_T = TypeVar("_T")


class Dice:
    """Choices of a seeded generator. Only its `random()` is used: Python promises that it never changes.

    Args:
        seed: of the choices.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def pick(self, choices: Sequence[_T]) -> _T:
        return choices[int(self.random() * len(choices))]


@dataclass(frozen=True)
class Story:
    """What a story says.

    Args:
        name: of the hero.
        animal: that the hero is.
        traits: a value of `WORLD` for each of its traits.
    """

    name: str
    animal: str
    traits: Mapping[str, str]


def write(dice: Dice, name: str, animal: str, given: Mapping[str, str] = MappingProxyType({})) -> str:
    """A story about a hero, with the traits that are given, and everything else by chance."""
    values = {slot: dice.pick(choices) for slot, choices in _SLOTS.items()}
    for trait, choices in WORLD.items():
        values[trait] = dice.pick(choices[given.get(trait) or dice.pick(list(choices))])
    return " ".join(dice.pick(line).format(name=name, animal=animal, **values) for line in _SENTENCES)


def read(text: str) -> Story | None:
    """What a story says, or None where it is none: a sentence out of place, a hero who changes, a broken word."""
    found = _STORY.fullmatch(text.strip())
    if found is None:
        return None
    said: dict[str, set[str]] = {}
    for key, phrase in found.groupdict().items():
        if phrase is not None:
            said.setdefault(key.rstrip("0123456789"), set()).add(phrase)
    if len(said["name"]) > 1 or len(said["animal"]) > 1:
        return None
    (name,), (animal,) = said["name"], said["animal"]
    traits = {trait: _MEANING[trait][said[trait].pop()] for trait in WORLD}
    return Story(name, animal, traits)


_MEANING = {
    trait: {phrase: value for value, phrases in choices.items() for phrase in phrases}
    for trait, choices in WORLD.items()
}


def _pattern() -> re.Pattern[str]:
    """All stories as one regular expression; a slot that occurs again is a group of its own (`name`, `name2` …)."""
    choices = {"name": NAMES, "animal": ANIMALS, **_SLOTS, **{trait: tuple(x) for trait, x in _MEANING.items()}}
    count = dict.fromkeys(choices, 0)

    def group(slot: re.Match[str]) -> str:
        count[slot[1]] += 1
        return f"(?P<{slot[1]}{count[slot[1]]}>{'|'.join(map(re.escape, choices[slot[1]]))})"

    lines = []
    for line in _SENTENCES:
        options = (re.sub(r"\{(\w+)\}", group, x.replace(".", r"\.")) for x in line)
        lines.append(f"(?:{'|'.join(options)})")
    return re.compile(" ".join(lines))


_STORY = _pattern()
