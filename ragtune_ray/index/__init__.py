"""Turns passages and their embeddings into a versioned index, and queries into hits.

In: passages and unit vectors. Out: immutable segments, versions that name them, and ranked hits.
This room knows nothing of generators.
"""
