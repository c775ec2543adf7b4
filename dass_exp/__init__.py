"""dass_exp: one-shot pruning of large language models, compared under equal conditions.

The functions here are what the command ``dass-exp`` runs, usable from a notebook without Hydra.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dass_exp.api import Pruned, load, load_masks, perplexity, prune
    from dass_exp.notebook import calibration_tokens, compare, dense_states, evaluate, records, run, save

__version__ = "0.1.0"
__all__ = [
    "Pruned",
    "calibration_tokens",
    "compare",
    "dense_states",
    "evaluate",
    "load",
    "load_masks",
    "perplexity",
    "prune",
    "records",
    "run",
    "save",
]

_BASIC = ("Pruned", "load", "load_masks", "perplexity", "prune")


def __getattr__(name: str) -> Any:
    """Import torch and transformers on first use: the command sets its environment before that."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow small products down
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return getattr(importlib.import_module("dass_exp.api" if name in _BASIC else "dass_exp.notebook"), name)


def __dir__() -> list[str]:
    """Name what there is, though it is imported later."""
    return sorted([*__all__, "__version__"])
