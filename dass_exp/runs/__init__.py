"""One run from its settings to its record.

In: validated settings. Out: a record, found or made. Trackers, launcher workers and planning stand here too.
"""
