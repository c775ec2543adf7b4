"""Scoring: perplexity, zero- and few-shot tasks.

In: a model, token windows, names of tasks. Out: scores, by window and by document.
"""

# part of every record's key; raise it when a score changes; 2: divergence, log-likelihoods of all choices
EVALUATION_VERSION = 2
