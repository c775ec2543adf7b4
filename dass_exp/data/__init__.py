"""Offline assets, texts, and the token sequences cut from them.

In: a text and how to cut it. Out: int64 tokens with their hash.
"""
