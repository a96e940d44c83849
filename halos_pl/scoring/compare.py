"""Policy against reference on the same rows."""

from __future__ import annotations

from dataclasses import replace

from halos_kernels import LogpOut, seq_logratio

from halos_pl.batch import CompletionLogps, Sequences


def compare(policy: LogpOut, reference: LogpOut | None, rows: Sequences) -> CompletionLogps:
    """Sum token log-probabilities over each completion and take the log-ratio, policy − reference, in nats.

    Args:
        policy: token log-probabilities [N] of `rows`.
        reference: the same by the reference, or None: then the log-ratio is the policy's log-probability.
        rows: which token belongs to which completion.
    """
    out = seq_logratio(policy.logp, None if reference is None else reference.logp, rows.cu_seqlens)
    return CompletionLogps(
        logratio=out.logratio,
        logp=out.logp,
        length=rows.cu_seqlens.diff(),
        token_logp=policy.logp,
        ref_logp=out.ref_logp,
        token_ref_logp=None if reference is None else reference.logp,
        entropy=policy.entropy,
    )


def per_token(scores: CompletionLogps) -> CompletionLogps:
    """The log-ratio as a mean over the completion's tokens: of a run without a reference (KTO paper, ICML)."""
    return replace(scores, logratio=scores.logratio / scores.length)
