"""Policy and reference as transformers models: loading, the head that scores, export to a Hugging Face folder."""

from halos_pl.models.export import export_policy
from halos_pl.models.head import Head, backbone, find_head, verify_head
from halos_pl.models.load import (
    ModelError,
    ModelSource,
    check_precision,
    enable_checkpointing,
    load_model,
    load_skeleton,
)

__all__ = [
    "Head",
    "ModelError",
    "ModelSource",
    "backbone",
    "check_precision",
    "enable_checkpointing",
    "export_policy",
    "find_head",
    "load_model",
    "load_skeleton",
    "verify_head",
]
