"""What readers ask for, and the program that says whether a story is it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from halos_pl.nano.grammar import ANIMALS, NAMES, WORLD, Dice, read, write

_REQUESTS = (
    "Tell me a story about {name} the {animal}.",
    "Write a story about a {animal} called {name}.",
    "I want a story about {name} the {animal}.",
)
_WISHES: Mapping[str, Sequence[str]] = {
    "day": ("Let it be {value}.", "It should happen on {value}."),
    "weather": ("Put some {value} in it.", "There should be {value}."),
    "colour": ("Put something {value} in it.", "I like {value} things."),
    "friend": ("Put the {value} in it.", "I want to meet the {value}."),
    "ending": ("Make it end {value}.", "Let them be {value}."),
}
HEEDED = 0.15
"""Share of the requests in the corpus whose wish is granted on purpose; the others are granted by chance alone."""
NOTED = 0.5
"""Chance of each trait to be noted before a story in plain text, which then keeps to the note."""

_EVERY_WISH = [(trait, value) for trait, values in WORLD.items() for value in values]


def prompts(seed: int, count: int) -> list[dict[str, Any]]:
    """Different requests with one wish each, in random order.

    Args:
        seed: of their choice.
        count: how many; at most one for each hero and wish.

    Returns:
        rows of `prompt` (one message of the user's), `name, animal, trait, value`; no two share the last four.
    """
    dice = Dice(seed)
    every = [(name, animal, *wish) for name in NAMES for animal in ANIMALS for wish in _EVERY_WISH]
    rows = []
    for i in range(count):  # Fisher and Yates
        j = i + int(dice.random() * (len(every) - i))
        every[i], every[j] = every[j], every[i]
        asked = dict(zip(("name", "animal", "trait", "value"), every[i], strict=True))
        rows.append({"prompt": [{"role": "user", "content": _request(dice, **asked)}]} | asked)
    return rows


def granted(row: Mapping[str, Any], completion: str) -> bool:
    """Whether a completion is a story about the hero that was asked for, and the wish is granted.

    Args:
        row: of `prompts`; its `name`, `animal`, `trait` and `value` are read.
        completion: what a model answered.

    Raises:
        KeyError: a row without one of these.
    """
    story = read(completion)
    asked = (row["name"], row["animal"], row["value"])
    return story is not None and asked == (story.name, story.animal, story.traits[row["trait"]])


def corpus(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Rows to learn the language from, in turns plain text and an answer to a request.

    Plain text is a story after notes about it, to which it keeps. Answers are about the right hero and nearly deaf to
    the wish (`HEEDED`): a model that learns this can do what is wished, and rarely does.

    Args:
        seed: of everything.
        count: of rows.
    """
    dice = Dice(seed)
    for i in range(count):
        name, animal = dice.pick(NAMES), dice.pick(ANIMALS)
        if i % 2:
            trait, value = dice.pick(_EVERY_WISH)
            ask = _request(dice, name, animal, trait, value)
            story = write(dice, name, animal, {trait: value} if dice.random() < HEEDED else {})
            yield {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": story}]}
        else:
            noted = {trait: dice.pick(list(values)) for trait, values in WORLD.items() if dice.random() < NOTED}
            notes = [_wish(dice, *note) for note in noted.items()]
            yield {"prompt": "", "completion": " ".join([*notes, write(dice, name, animal, noted)])}


def _request(dice: Dice, name: str, animal: str, trait: str, value: str) -> str:
    return f"{dice.pick(_REQUESTS).format(name=name, animal=animal)} {_wish(dice, trait, value)}"


def _wish(dice: Dice, trait: str, value: str) -> str:
    return dice.pick(_WISHES[trait]).format(value=value)
