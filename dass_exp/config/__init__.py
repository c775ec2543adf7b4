"""The typed settings of a run and the objects that they name.

In: what Hydra composed. Out: validated settings, or one line that says what is wrong. Imports nothing of the engine.
"""
