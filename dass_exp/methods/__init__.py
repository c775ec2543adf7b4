"""How a mask is chosen: base.py and one file per method.

In: weights by role and the statistics of their inputs. Out: masks, and weights where a method changes them.
"""
