"""One model behind one forward: token rows in, log-probabilities of their completion tokens out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from halos_kernels import Head, linear_logp, linear_logp_multi
from torch import Tensor, nn
from transformers import PreTrainedModel

from halos_pl.batch import Sequences
from halos_pl.models import backbone, find_head

T = TypeVar("T")


class TokenScores(NamedTuple):
    """What a model says of the scored tokens."""

    logp: Tensor  # [N] nats
    entropy: Tensor | None = None  # [N] of the next-token distribution, where asked for
    value: Tensor | None = None  # [N] by the value head, where there is one


class Scorer(nn.Module):
    """Backbone and head as one root, whose forward is the only way in: sharded weights are whole only inside it.

    Only the hidden states that predict a completion token reach the head, and no logits of tokens × vocabulary exist.

    Args:
        lm: a causal language model of transformers.
        value_head: predict a value of every scored token too, by a linear layer that starts at 0.
    """

    def __init__(self, lm: PreTrainedModel, *, value_head: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.value_head: nn.Linear | None = None
        if value_head:
            weight = find_head(lm).weight
            dtype = weight.dtype if weight.requires_grad else torch.promote_types(weight.dtype, torch.float32)
            self.value_head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(
        self, rows: Sequences, *, entropy: bool = False, then: Callable[[Head], T] | None = None
    ) -> TokenScores | T:
        """Log-probability [N] of every scored token, in nats (and the entropy [N] of its distribution; and its value).

        With `then`: what that returns, called with hidden states [N, d] and head while the weights are whole. It asks
        for the entropies itself, and sees no value: together with either it raises ValueError.
        """
        if then is not None and (entropy or self.value_head is not None):
            raise ValueError("entropy and value go with the log-probabilities, which `then` replaces")
        body = backbone(self.lm)
        hidden = [body(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1) for ids in rows.blocks]
        predicting = (hidden[0] if len(hidden) == 1 else torch.cat(hidden)).index_select(0, rows.predictors)
        own = find_head(self.lm)
        if then is not None:
            return then(Head(predicting, own.weight, bias=own.bias, logit_scale=own.scale, softcap=own.softcap))
        out = linear_logp(
            predicting,
            own.weight,
            rows.targets,
            bias=own.bias,
            logit_scale=own.scale,
            softcap=own.softcap,
            entropy=entropy,
        )
        if self.value_head is None:
            return TokenScores(out.logp, out.entropy)
        value = self.value_head(predicting.to(self.value_head.weight.dtype))[:, 0].to(out.logp.dtype)
        return TokenScores(out.logp, out.entropy, value)

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        """`lm.generate`, by a way in that has the weights whole.

        Args:
            ids: [B, T] prompts.
            options: of `generate`.
        """
        out: Tensor = self.lm.generate(ids, **options)  # type: ignore[operator]  # typed as a tensor in some releases
        return out


def score_both(
    policy: Scorer,
    reference: Scorer | Callable[[Sequences], TokenScores],
    rows: Sequences,
    *,
    entropy: bool = False,
) -> tuple[TokenScores, TokenScores]:
    """Policy and reference on the same rows; only the policy's part carries a gradient.

    Where gradients are off (and there is no value head), both heads go in one launch, inside both forwards, and
    `entropy` is of both. A reference that is no model of its own (`SharedReference`) goes first, alone: sharded weights
    are not whole twice.
    """
    if torch.is_grad_enabled() or policy.value_head is not None or not isinstance(reference, Scorer):
        with torch.no_grad():
            frozen = reference(rows)
        return policy(rows, entropy=entropy), frozen
    both = policy(
        rows,
        then=lambda head: reference(
            rows, then=lambda other: linear_logp_multi([head, other], rows.targets, entropy=entropy)
        ),
    )
    first, second = (TokenScores(out.logp, out.entropy) for out in both)
    return first, second
