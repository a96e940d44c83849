"""Models in shards (FSDP2), and their tensors whole again."""

from halos_pl.parallel.sharding import Plan, decoder_layers
from halos_pl.parallel.tensors import gathered, like, local, local_rows, whole

__all__ = ["Plan", "decoder_layers", "gathered", "like", "local", "local_rows", "whole"]
