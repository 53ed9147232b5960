"""Turns passages and their embeddings into a versioned index, and queries into hits.

In: passages and unit vectors. Out: immutable segments, versions that name them, and ranked hits.
This room may not know about prompts, generators or Ray.
"""

from ragtune_ray import RagtuneError


class IndexDataError(RagtuneError, ValueError):
    """Files or vectors of an index are damaged or do not belong together; the message names them."""
