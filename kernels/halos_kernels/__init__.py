"""Exact log-probabilities of completions, without logits: the fused seam between hidden states and losses.

| name | from | to |
|---|---|---|
| `linear_logp` | hidden states [N, d], output weight [V, d], targets [N] | log-probabilities [N] in nats |
| `linear_logp_multi` | the same of several `Head`s, without gradients | one of each |
| `seq_logratio` | packed token log-probabilities [N] of policy and reference | log-ratios [B] |
"""

from __future__ import annotations

from halos_kernels.inputs import LogpOut
from halos_kernels.linear_logp import Head, linear_logp, linear_logp_multi
from halos_kernels.seq_logratio import SeqOut, seq_logratio

__all__ = ["Head", "LogpOut", "SeqOut", "linear_logp", "linear_logp_multi", "seq_logratio"]
