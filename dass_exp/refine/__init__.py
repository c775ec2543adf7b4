"""Better masks: exchange weights between those kept and those removed.

In: a mask, the dense weight and statistics of its input. Out: a mask of the same pattern.
"""
