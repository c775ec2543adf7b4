"""dass_exp: one-shot pruning of large language models, compared honestly.

The functions here are what the command ``dass-exp`` runs, usable from a notebook without Hydra.
"""

from __future__ import annotations

from dass_exp.api import Pruned, load, perplexity, prune

__version__ = "0.1.0"
__all__ = ["Pruned", "load", "perplexity", "prune"]
