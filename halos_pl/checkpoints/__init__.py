"""What a run goes on from: a folder of tensors that appears whole or not at all, and when one is written."""

from halos_pl.checkpoints.callback import Checkpoints
from halos_pl.checkpoints.errors import CheckpointError
from halos_pl.checkpoints.folder import FolderIO, Stored, open_checkpoint, save_checkpoint

__all__ = ["CheckpointError", "Checkpoints", "FolderIO", "Stored", "open_checkpoint", "save_checkpoint"]
