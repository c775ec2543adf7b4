"""Scoring: perplexity, zero- and few-shot tasks.

In: a model, token windows, names of tasks. Out: scores, by window and by document.
"""

import importlib
import sys
import types
from typing import Any

# part of every record's key; raise it when a score changes; 2: divergence, log-likelihoods of all choices
EVALUATION_VERSION = 2


class _Folder(types.ModuleType):
    """A folder that can be called: ``dass_exp.evaluate`` is also a function of the Python interface.

    Python makes a folder that was imported an attribute of its package, whatever that had under this name.
    """

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """Score a model in memory (:func:`dass_exp.notebook.evaluate`)."""
        return importlib.import_module("dass_exp.notebook").evaluate(*arguments, **settings)


sys.modules[__name__].__class__ = _Folder
