"""Scoring: perplexity and zero-shot tasks."""

EVALUATION_VERSION = 1  # part of every record's key; raise it when a score changes
