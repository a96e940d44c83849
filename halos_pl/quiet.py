"""Silence about things that are as they should be."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO

import transformers

_WARNINGS = (
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",  # the reference
    ".*isinstance.treespec, LeafSpec.*",
    "Total length of .list. across ranks is zero",  # no held-out rows
    ".*sync_dist=True.*",  # Averages has reduced over the ranks
    ".*number of training batches.*is smaller than the logging interval.*",  # on_train_end logs the rest
    "Checkpoint directory .* exists and is not empty.*",  # a run that goes on
)
_INFOS = ("Tip:", "TPU available", "GPU available: False", "Loading `train_dataloader`")


def quieten() -> None:
    """Leave out what other libraries say of a run that is in order, and the line of code in their warnings."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of calls that LightningCLI makes
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    warnings.showwarning = _show_warning
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    transformers.utils.logging.disable_progress_bar()


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _INFOS)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"halos_pl: warning: {message}", file=sys.stderr)
