"""What is in order is not told; what is not, is, in one line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from halos_pl.quiet import quieten


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before, shown = list(logger.filters), warnings.showwarning
    with warnings.catch_warnings():
        yield
    logger.filters[:] = before
    warnings.showwarning = shown


def test_only_news_are_told(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    quieten()
    warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck", stacklevel=1)
    warnings.warn("your house is on fire", stacklevel=1)
    assert capsys.readouterr().err == "halos_pl: warning: your house is on fire\n"
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO, logger=logger.name):
        for text in ("TPU available: False, using: 0 TPU cores", "GPU available: True (cuda), used: True"):
            logger.info(text)
    assert caplog.messages == ["GPU available: True (cuda), used: True"]
