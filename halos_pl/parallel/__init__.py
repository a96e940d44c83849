"""Models in shards (FSDP2), and their tensors whole again."""

from halos_pl.parallel.sharding import Layout, Plan, adopt, decoder_layers, layout
from halos_pl.parallel.tensors import gathered, like, local, local_rows, whole

__all__ = ["Layout", "Plan", "adopt", "decoder_layers", "gathered", "layout", "like", "local", "local_rows", "whole"]
