"""Feedback in, typed batches out: sources, records, tokenization, y′, order, collation."""

from halos_pl.data.datamodule import AlignmentData
from halos_pl.data.records import DataError, DataWarning

__all__ = ["AlignmentData", "DataError", "DataWarning"]
