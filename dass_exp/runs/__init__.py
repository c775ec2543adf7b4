"""One run from its settings to its record.

In: validated settings. Out: a record, new or existing. Trackers, launcher workers and planning are here too.
"""
