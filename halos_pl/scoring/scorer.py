"""One model behind one forward: token rows in, log-probabilities of their completion tokens out."""

from __future__ import annotations

import torch
from halos_kernels import LogpOut, linear_logp
from torch import nn
from transformers import PreTrainedModel

from halos_pl.batch import Sequences
from halos_pl.models import backbone, find_head


class Scorer(nn.Module):
    """Backbone and head as one root, whose forward is the only way in: sharded weights are whole only inside it.

    Only the hidden states that predict a completion token reach the head, and no logits of tokens × vocabulary exist.

    Args:
        lm: a causal language model of transformers.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, rows: Sequences, *, entropy: bool = False) -> LogpOut:
        """Log-probability [N] of every scored token, in nats (and the entropy [N] of its distribution)."""
        body = backbone(self.lm)
        hidden = [body(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1) for ids in rows.blocks]
        predicting = (hidden[0] if len(hidden) == 1 else torch.cat(hidden)).index_select(0, rows.predictors)
        head = find_head(self.lm)
        return linear_logp(
            predicting,
            head.weight,
            rows.targets,
            bias=head.bias,
            logit_scale=head.scale,
            softcap=head.softcap,
            entropy=entropy,
        )
