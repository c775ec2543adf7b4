"""Model families; loading, streaming and saving of models.

In: a typed ModelConfig. Out: a model, or its blocks one by one, and its weight matrices by role.
"""
