"""The loop over decoder blocks.

In: a model, calibration tokens, a method, callbacks. Out: a pruned model and a report per block.
"""
