"""What ships: `nano:NAME` stands for a model, a file of feedback or a generated text, wherever the package lies."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from halos_pl.nano.wishes import corpus

SCHEME = "nano:"
ASSETS = Path(__file__).resolve().parents[1] / "assets"
PLACES = {
    "model": "nano",
    "thumbs": "thumbs.jsonl",
    "thumbs-held-out": "thumbs-held-out.jsonl",
    "pairs": "pairs.jsonl",
    "pairs-held-out": "pairs-held-out.jsonl",
    "prompts": "prompts.jsonl",
}
"""name → folder or file below `assets/`."""
TEXTS = {
    "stories": (0, 40_000, None),
    "stories-held-out": (1, 400, None),
    "text-held-out": (2, 800, "prompt"),
}
"""name → seed and number of rows of the corpus, and the key that a row must have to be taken."""


def locate(name: str) -> str:
    """The path that a `nano:` name stands for; any other name unchanged.

    Raises:
        ValueError: nothing of that name ships.
    """
    if not name.startswith(SCHEME):
        return name
    key = name.removeprefix(SCHEME)
    if key in TEXTS:
        raise ValueError(f"{name} is a text, written anew each time it is read: it goes where rows go, not here")
    if key not in PLACES:
        near = difflib.get_close_matches(key, [*PLACES, *TEXTS], n=1)
        every = ", ".join(SCHEME + x for x in (*PLACES, *TEXTS))
        hint = f"did you mean {SCHEME}{near[0]}?" if near else f"there are {every}"
        raise ValueError(f"{name}: nothing of that name ships here; {hint}")
    return str(ASSETS / PLACES[key])


def generated(name: str) -> Iterator[dict[str, object]] | None:
    """Rows of a text that is not stored but written anew each time, the same every time; None for any other name."""
    key = name.removeprefix(SCHEME)
    if not name.startswith(SCHEME) or key not in TEXTS:
        return None
    seed, count, wanted = TEXTS[key]
    return (row for row in corpus(seed, count) if wanted is None or wanted in row)


def refuse_mixture(sources: Mapping[str, str | Sequence[str] | None]) -> None:
    """What ships goes together: its held-out rows and prompts say nothing about feedback of the user's own.

    Args:
        sources: option → source, or None.

    Raises:
        ValueError: naming the options.
    """
    named = {key: [value] if isinstance(value, str) else value for key, value in sources.items() if value}
    ships = {key: value for key, value in named.items() if any(x.startswith(SCHEME) for x in value)}
    own = [key for key in named if key not in ships]
    if own and ships:
        key, value = next(iter(ships.items()))
        others = [*ships, *(["evaluation.verifier"] if "evaluation.prompts" in named else [])]
        raise ValueError(
            f"{own[0]} is your own, but {key} is the demo's ({', '.join(value)}): for a model and feedback of your own "
            f"take recipes/kto.yaml (or dpo, sft), or set {', '.join('--' + x for x in others)}; null leaves one out"
        )
