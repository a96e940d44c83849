"""Control tokens: the end of a prompt that tells a desirable completion from an undesirable one (conditional SFT)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer


class Control:
    """The token ids that end a prompt, by the label of its completion; none for a completion without a label.

    A text that is a token of the vocabulary is that one id. Another is its several pieces: no embedding is added.

    Args:
        texts: of desirable and of undesirable completions; None for no control at all.
        continuation: tokenizes what follows a prompt.
        refused: ids that a text must not have (BOS, EOS).

    Raises:
        ValueError: a text without tokens or with a refused one, or two with the same.
    """

    def __init__(
        self, texts: tuple[str, str] | None, continuation: Tokenizer, refused: Iterable[int | None] = ()
    ) -> None:
        good, bad = ([*continuation.encode(x, add_special_tokens=False).ids] for x in texts or ("", ""))
        self.ids: dict[bool | None, list[int]] = {True: good, False: bad, None: []}
        self.size = max(len(good), len(bad))
        self.ending = "" if texts is None else f"{{{{ {texts[0]!a} if add_generation_prompt else '' }}}}"
        for text, ids in zip(texts or (), (good, bad), strict=False):
            if not ids:
                raise ValueError(f"control {text!r} is tokenized as nothing; expected text, or a token")
            if found := sorted(set(ids) & set(refused)):
                raise ValueError(f"control {text!r} holds the token that begins or ends a text, {found}; take another")
        if texts is not None and good == bad:
            raise ValueError(f"control {texts[0]!r} and {texts[1]!r} are tokenized alike, as {good}")

    def ends(self, template: str) -> str:
        """A chat template whose generation prompt ends in the good text; one that does already is left as it is."""
        # Jinja drops one newline at the end; an expression, unlike a block, takes no spaces before it away.
        return re.sub(r"(\r\n|\r|\n)\Z", "", self.without(template)) + self.ending

    def without(self, template: str) -> str:
        """What `ends` was made from."""
        return template.removesuffix(self.ending)
