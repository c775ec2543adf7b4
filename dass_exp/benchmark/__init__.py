"""Measure what pruning costs: ``make bench``.

In: an offline model. Out: seconds against unavoidable forward passes, peak memory, and the needs of large models.
"""
