"""The curves of a run as one CSV file, without gap or double when the run is resumed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

Row = dict[str, str]


class Curves(Logger):
    """Appends every logged row to `metrics.csv` as soon as it is logged.

    Lightning's CSVLogger deletes the rows that it finds.

    Args:
        folder: of the file.
        keep: which of the rows that are there to keep, of (step, row); default: none.
    """

    def __init__(self, folder: Path, keep: Callable[[int, Row], bool] = lambda step, row: False) -> None:
        super().__init__()
        self.folder, self.path = folder, folder / "metrics.csv"
        self._keep: Callable[[int, Row], bool] | None = keep
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def log_dir(self) -> str:
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """None: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": str(step or 0)} | {name: str(float(value)) for name, value in metrics.items()}
        if "epoch" in metrics:
            row["epoch"] = str(int(metrics["epoch"]))
        if self._keep is not None:
            keep, self._keep = self._keep, None
            self._rewrite([x for x in self.rows() if keep(int(x["step"]), x)], row)
        elif set(row) <= set(self._columns):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        else:
            self._rewrite(self.rows(), row)

    def rows(self) -> list[Row]:
        """All that the file holds."""
        if not self.path.is_file():
            return []
        text, end, _ = self.path.read_text(encoding="utf-8").rpartition("\n")  # without a row that was cut by death
        whole = (row for row in csv.DictReader((text + end).splitlines()) if (row.get("step") or "").isdecimal())
        return [{name: value or "" for name, value in row.items() if name} for row in whole]

    def _rewrite(self, rows: list[Row], row: Row) -> None:
        rows = [*rows, row]
        self._columns = list(dict.fromkeys(["epoch", "step", *(name for x in rows for name in x)]))
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".partial")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        aside.replace(self.path)


def before(step: float, every: int | None) -> Callable[[int, Row], bool]:
    """Which rows a run that goes on after so many optimizer steps has written up to there.

    Args:
        step: of the checkpoint; inf for all rows.
        every: steps between two training rows. One of other steps was the last of a run that had ended.
    """

    def keep(at: int, row: Row) -> bool:
        closing = bool(row.get("train/loss")) and every and at == step - 1 and step % every != 0
        return at < step and not closing

    return keep
