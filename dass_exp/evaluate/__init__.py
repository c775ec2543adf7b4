"""Scoring: perplexity and zero-shot tasks.

In: a model, token windows, names of tasks. Out: scores, by window and by document.
"""

EVALUATION_VERSION = 2  # part of every record's key; raise it when a score changes; 2: divergence
