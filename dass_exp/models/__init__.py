"""Model families, and loading, streaming and saving of models.

In: a typed ModelConfig. Out: a model, or its blocks one after the other, and its weight matrices by role.
"""
