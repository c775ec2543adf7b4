"""Better surviving weights under a mask.

In: masks, dense and pruned weights, statistics of their inputs. Out: weights; zeros stay zero.
"""
