"""Align language models with human-aware losses on PyTorch Lightning.

Importing this package is cheap: torch, lightning and transformers load with the submodule that needs them.
"""

__version__ = "0.1.0"
