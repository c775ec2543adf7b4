"""Files that survive a crash: tensors, packed masks, records and their schema.

In: tensors and JSON values. Out: files that are either complete or absent.
"""
