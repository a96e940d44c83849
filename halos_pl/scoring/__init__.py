"""From token rows to log-probabilities, log-ratios and the reference point."""

from halos_pl.scoring.compare import compare, per_token
from halos_pl.scoring.reference_point import RunningMean, global_mean, reference_point
from halos_pl.scoring.scorer import Scorer, score_both

__all__ = ["RunningMean", "Scorer", "compare", "global_mean", "per_token", "reference_point", "score_both"]
