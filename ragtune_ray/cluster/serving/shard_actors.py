"""Searches an index that is divided among actors, one per shard, as the endpoint does it, but without Serve.

For jobs that search with the questions of a few, not of a whole batch at once; those run in stages (`answering.sharded`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ragtune_ray import config, schema
from ragtune_ray.answering import searching
from ragtune_ray.cluster.serving import divided
from ragtune_ray.cluster.serving.shard import ShardReplica
from ragtune_ray.index import retriever
from ragtune_ray.models.encoder import load_encoder

SHARD_CPUS = 0.01
"""Cores that the actor of a shard reserves: it mostly waits, but a node with no cores, such as a head, must not get one."""


@contextlib.contextmanager
def started(settings: config.Config, num_shards: int) -> Iterator[list[Any]]:
    """Actors for so many shards of a config's index, until the block ends; a Ray session must be open."""
    import ray

    make = ray.remote(ShardReplica).options(num_cpus=SHARD_CPUS, scheduling_strategy="SPREAD")
    actors = [make.remote(settings, number, num_shards) for number in range(num_shards)]
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


class DividedRetriever:
    """Searches a version of an index through the actors of its shards; the encoder and the reranker are in this process.

    Args:
        settings: the whole config.
        version: of the index.
        shards: from `started`.
    """

    def __init__(self, settings: config.Config, version: str, shards: Sequence[Any]) -> None:
        retrieval = settings.retrieval
        encoder = None if retrieval.mode == "lexical" else load_encoder(settings.encoder)
        reranker = retriever.load_reranker(retrieval)
        self._visible = retriever.visible(settings)
        self._index = divided.DividedIndex(
            settings, version, _ActorShards(list(map(_Handle, shards))), encoder, reranker
        )

    def search(self, asked: Sequence[searching.Texts], top_k: int) -> list[searching.Shown]:
        """The passages of each question and their scores, best first.

        Raises:
            ShardError: a shard does not answer, or a question cannot be searched for.
        """
        found = []
        for shown in self._index.search(asked, top_k, self._visible):
            if isinstance(shown, str):
                raise divided.ShardError(shown)
            found.append(shown)
        return found

    def retrieve_passages(self, texts: Sequence[str], top_k: int) -> list[tuple[list[schema.Passage], list[float]]]:
        """The passages of each query's hits and their scores, best first; raises as `search`."""
        return [(list(passages), list(scores)) for passages, scores in self.search([(text,) for text in texts], top_k)]


class _ActorShards(divided.Shards):
    def open_everywhere(self, version: str) -> None:
        self.ask("open", version, seconds=divided.OPENING_SECONDS)


class _Handle:
    """An actor with the part of a Serve handle's interface that `divided.Shards` calls."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> _Method:
        return _Method(getattr(self._actor, method))


class _Method:
    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *arguments: Any) -> _Response:
        return _Response(self._method.remote(*arguments))


class _Response:
    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def result(self, timeout_s: float) -> Any:
        import ray

        return ray.get(self._reference, timeout=timeout_s)

    def cancel(self) -> None:
        import ray

        ray.cancel(self._reference)
