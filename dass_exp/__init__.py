"""dass_exp: one-shot pruning of large language models, compared under equal conditions.

The functions here are what the command ``dass-exp`` runs, usable from a notebook without Hydra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dass_exp.api import Pruned, load, load_masks, perplexity, prune

__version__ = "0.1.0"
__all__ = ["Pruned", "load", "load_masks", "perplexity", "prune"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers on first use: the command sets its environment before that."""
    if name in __all__:
        return getattr(importlib.import_module("dass_exp.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
