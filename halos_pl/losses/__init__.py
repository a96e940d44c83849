"""What feedback teaches: pure functions of log-probabilities, and the objectives that a config selects by `class_path`.

| function | objective | feedback | source |
|---|---|---|---|
| `kto_loss` | `KTO` | thumbs up or down | KTO report, eq. 7–8 |
| `dpo_loss` | `DPO` | preference pairs | KTO report, eq. 4 |
| `sft_loss` | `SFT` | demonstrations | maximum likelihood |

The functions are unreduced; the training step takes the mean over the objective's `unit`.
"""

from __future__ import annotations

from halos_pl.losses.dpo import DPO, dpo_loss
from halos_pl.losses.kto import KTO, kto_loss
from halos_pl.losses.objective import Objective
from halos_pl.losses.sft import SFT, sft_loss

__all__ = ["DPO", "KTO", "SFT", "Objective", "dpo_loss", "kto_loss", "sft_loss"]
