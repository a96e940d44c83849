"""The reference that is the policy itself, with other adapters: no second model."""

from __future__ import annotations

from halos_pl.batch import Sequences
from halos_pl.models import acting
from halos_pl.scoring.scorer import Scorer, TokenScores


class SharedReference:
    """The policy as it was at the start: with its adapters off, or with the adapter that it went on with.

    It owns no weights and is no module: nothing of it is stored, sharded or moved.

    Args:
        policy: an adapted model behind its one forward.
        adapter: name of the adapter that acts; None: none.
        dropout: whether the policy has any, to be switched off here. Without, its mode is left alone: in another mode
            8-bit weights round otherwise, and log-ratios of equal models are not 0.
    """

    def __init__(self, policy: Scorer, adapter: str | None = None, *, dropout: bool = False) -> None:
        self.policy, self.adapter, self.dropout = policy, adapter, dropout

    def __str__(self) -> str:
        return "the policy with " + ("its adapters off" if self.adapter is None else "the adapter that it began with")

    def __call__(self, rows: Sequences) -> TokenScores:
        """What the start says of the scored tokens; all that takes part is frozen, and nothing drops out."""
        quieten = self.dropout and self.policy.training
        if quieten:
            self.policy.eval()
        try:
            with acting(self.policy.lm, self.adapter):
                return self.policy(rows)
        finally:
            if quieten:
                self.policy.train()
