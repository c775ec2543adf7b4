"""In: a dense block and the importance of its weights. Out: the order in which its intermediate neurons stand.

``base.py`` holds the base class; every other file is one way to order.
"""
