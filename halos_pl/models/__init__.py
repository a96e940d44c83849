"""Policy and reference as transformers models: loading, the head that scores, export to a Hugging Face folder."""

from halos_pl.models.adapter import export_adapter
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
from halos_pl.models.lora import START, LoRA, acting, adapt, merged

__all__ = [
    "START",
    "Head",
    "LoRA",
    "ModelError",
    "ModelSource",
    "acting",
    "adapt",
    "backbone",
    "check_precision",
    "enable_checkpointing",
    "export_adapter",
    "export_policy",
    "find_head",
    "load_model",
    "load_skeleton",
    "merged",
    "verify_head",
]
