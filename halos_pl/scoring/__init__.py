"""From token rows to log-probabilities, log-ratios and the reference point."""

from halos_pl.scoring.compare import compare, per_token
from halos_pl.scoring.pair import Reference, load_pair
from halos_pl.scoring.reference_point import RunningMean, global_mean, reference_point
from halos_pl.scoring.scorer import Scorer, score_both
from halos_pl.scoring.shared_reference import SharedReference

__all__ = [
    "Reference",
    "RunningMean",
    "Scorer",
    "SharedReference",
    "compare",
    "global_mean",
    "load_pair",
    "per_token",
    "reference_point",
    "score_both",
]
