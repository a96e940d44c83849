"""Policy against reference on the same rows."""

from __future__ import annotations

from dataclasses import replace

from halos_kernels import seq_logratio

from halos_pl.batch import CompletionLogps, Sequences
from halos_pl.scoring.scorer import TokenScores


def compare(
    policy: TokenScores, reference: TokenScores | None, rows: Sequences, *, clamp: tuple[float, float] | None = None
) -> CompletionLogps:
    """Sum token log-probabilities over each completion and take the log-ratio, policy − reference, in nats.

    Args:
        policy: token log-probabilities [N] of `rows`.
        reference: the same by the reference, or None: then the log-ratio is the policy's log-probability.
        rows: which token belongs to which completion.
        clamp: bounds of every token's log-ratio.
    """
    out = seq_logratio(policy.logp, None if reference is None else reference.logp, rows.cu_seqlens)
    scores = CompletionLogps(
        logratio=out.logratio,
        logp=out.logp,
        length=rows.cu_seqlens.diff(),
        token_logp=policy.logp,
        ref_logp=out.ref_logp,
        entropy=policy.entropy,
        value=policy.value,
    )
    if reference is None:
        return scores
    token_logratio = policy.logp - reference.logp
    if clamp is None:
        return replace(scores, token_logratio=token_logratio)
    token_logratio = token_logratio.clamp(*clamp)
    clamped = seq_logratio(token_logratio, None, rows.cu_seqlens).logp
    return replace(scores, token_logratio=token_logratio, logratio=clamped)


def per_token(scores: CompletionLogps) -> CompletionLogps:
    """The log-ratio as a mean over the completion's tokens: of a run without a reference (KTO paper, ICML)."""
    return replace(scores, logratio=scores.logratio / scores.length)
