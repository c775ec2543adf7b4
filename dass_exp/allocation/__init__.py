"""How much of each block is removed under one budget.

In: a number that each dense block got, and its sizes. Out: a pattern for each block, of the same total sparsity.
"""
