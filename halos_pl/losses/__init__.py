"""What feedback teaches: pure functions of log-probabilities, and the objectives that a config selects by `class_path`.

One file a family. The functions are unreduced; the training step takes the mean over the objective's `unit`. Data,
reference, passes, formula and source of each: `python -m halos_pl objectives`.
"""

from __future__ import annotations

from halos_pl.losses.bco import BCO, bco_loss
from halos_pl.losses.checks import NaNError, nan_passes
from halos_pl.losses.dpo import CDPO, DPO, cdpo_loss, dpo_loss
from halos_pl.losses.ipo import IPO, ipo_loss
from halos_pl.losses.kto import KTO, APOZero, kto_loss
from halos_pl.losses.kto_v1 import KTOv1, kto_v1_loss
from halos_pl.losses.objective import LogRatioObjective, Objective
from halos_pl.losses.orpo import ORPO, orpo_loss
from halos_pl.losses.ppo import PPOOffline, ppo_offline_loss
from halos_pl.losses.sft import CSFT, SFT, sft_loss
from halos_pl.losses.simpo import SimPO, simpo_loss
from halos_pl.losses.slic import SLiC, slic_loss

OBJECTIVES: tuple[type[Objective], ...] = (
    KTO,
    DPO,
    SFT,
    CDPO,
    IPO,
    SimPO,
    SLiC,
    ORPO,
    PPOOffline,
    CSFT,
    KTOv1,
    APOZero,
    BCO,
)
"""All that ship, in the order of the tables."""

__all__ = [
    "BCO",
    "CDPO",
    "CSFT",
    "DPO",
    "IPO",
    "KTO",
    "OBJECTIVES",
    "ORPO",
    "SFT",
    "APOZero",
    "KTOv1",
    "LogRatioObjective",
    "NaNError",
    "Objective",
    "PPOOffline",
    "SLiC",
    "SimPO",
    "bco_loss",
    "cdpo_loss",
    "dpo_loss",
    "ipo_loss",
    "kto_loss",
    "kto_v1_loss",
    "nan_passes",
    "orpo_loss",
    "ppo_offline_loss",
    "sft_loss",
    "simpo_loss",
    "slic_loss",
]
