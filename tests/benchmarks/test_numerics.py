"""The measurement of rounding runs, and fails where ours is not exact enough."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def numerics(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    return importlib.import_module("benchmarks.numerics")


@pytest.fixture
def pretend(numerics: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], None]:
    def replace(logp: Callable[..., Tensor]) -> None:
        monkeypatch.setitem(numerics.PEERS, "ours", type(numerics.PEERS["ours"])(lambda: logp))

    return replace


def test_quick(numerics: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "numerics.json"
    assert numerics.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    printed, report = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    assert report.keys() == {"benchmark", "device", "commit", "date", "versions", "settings", "rows"}
    assert numerics.table(report["rows"]) in printed
    measured = {(x["path"], x["perturbation"]): x for x in report["rows"] if x["status"] == "measured"}
    for perturbation in (0.002, 0.02):
        ours, rounded = (measured[name, perturbation] for name in ("ours", "liger-semantics"))
        assert ours["logratio_rms"] < 1e-3 < 1e-2 < rounded["logratio_rms"]
        assert ours["token_rms"] < 1e-5
        assert ours["largest_self_ratio"] == 0
    if importlib.util.find_spec("cut_cross_entropy") is None:
        assert 'cut-cross-entropy, reduction="none": not installed' in printed


def test_fails_where_ours_rounds(numerics: Any, pretend: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(numerics.rounded_logits)
    assert numerics.main(["--quick", "--device", "cpu"]) == 1
    assert "nats, below 0.001 was asked" in capsys.readouterr().err


def test_fails_where_the_order_of_rows_matters(numerics: Any, pretend: Any, capsys: pytest.CaptureFixture[str]) -> None:
    exact = numerics.load_peer("ours", "cpu")

    def ordered(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return exact(hidden, weight, targets) + 1e-9 * torch.arange(len(targets), dtype=torch.float64)

    pretend(ordered)
    assert numerics.main(["--quick", "--device", "cpu"]) == 1
    assert "policy = reference, but log-ratio" in capsys.readouterr().err


def test_log_ratios_by_hand(numerics: Any) -> None:
    reference, policy = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-1.5, -2.0, -2.0, -4.5])
    assert numerics.logratios(reference, policy, 2).tolist() == [-0.5, 0.5]
