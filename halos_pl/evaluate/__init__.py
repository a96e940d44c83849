"""Did it get better? Sampling from a model, and programs that verify what it said."""

from halos_pl.evaluate.callback import Evaluation
from halos_pl.evaluate.interval import clopper_pearson
from halos_pl.evaluate.sample import Sampling, sample
from halos_pl.evaluate.verifier import Verifier

__all__ = ["Evaluation", "Sampling", "Verifier", "clopper_pearson", "sample"]
