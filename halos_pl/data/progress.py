"""A progress bar for what may take long; nothing where it does not, or where nobody looks."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PATIENCE = 1.0  # seconds before a bar is shown
NOTEWORTHY = 10.0  # seconds from which on a log without a bar gets a line


class Progress:
    """Counts rows; on a terminal it is a bar after a second, elsewhere one line at the end of a long time."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.console = Console(stderr=True, highlight=False)
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self.begun = time.monotonic()
        return self

    def advance(self, rows: int) -> None:
        self.reach(self.done + rows)

    def reach(self, rows: int) -> None:
        self.done = rows if self.total is None else min(rows, self.total)
        if self._bar is None and self.console.is_terminal and time.monotonic() - self.begun > PATIENCE:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
            self._bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if error is None and (seconds := time.monotonic() - self.begun) > NOTEWORTHY:
            self.console.print(f"{self.what}: {self.done:,} rows in {seconds:.0f} s", soft_wrap=True)
