"""Measures how long one answer takes when questions are asked one at a time, without a network or batches.

An index larger than `cluster.shard_bytes` is searched as the endpoint does it, by one process per shard.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ragtune_ray import config, schema
from ragtune_ray.cluster import actors, devices, session
from ragtune_ray.evaluation.comparison import Latency, Percentiles
from ragtune_ray.index import snapshot, versions

if TYPE_CHECKING:
    from ragtune_ray.answering.searching import Shown, Texts
    from ragtune_ray.generation.interface import Generator

    Search: TypeAlias = Callable[[Texts], Shown]
    """Returns the passages for a question that is searched with some texts."""

SHARD_CPUS = 0.01
"""Cores that the process of a shard reserves: it mostly waits, but a node with no cores, such as a head, must not get one."""


def measure(arms: Sequence[tuple[config.Config, str]], queries: Sequence[schema.Query]) -> list[Latency]:
    """Answer the queries one at a time in each arm, in a Ray task; a session must be open, and the cluster should be idle.

    Args:
        arms: (config, index version or "" if it does not retrieve) of each arm; consecutive arms with the same generator load
            it once.
        queries: the first one is asked twice per arm, once unmeasured to warm up.
    """
    import ray

    actors.release()
    options = {**session.worker_options(arms[0][0].cluster), "max_retries": 1}
    seconds_of_arms = ray.get(ray.remote(_answer_one_by_one).options(**options).remote(list(arms), list(queries)))
    return [
        Latency(
            retrieval=_percentiles(seconds[:, 0]),
            generation=_percentiles(seconds[:, 1]),
            total=_percentiles(seconds.sum(axis=1)),
            n=len(queries),
        )
        for seconds in seconds_of_arms
    ]


def _percentiles(seconds: np.ndarray) -> Percentiles:
    median, high = np.quantile(seconds, [0.5, 0.95])
    return Percentiles(p50_seconds=round(float(median), 4), p95_seconds=round(float(high), 4))


def _answer_one_by_one(arms: list[tuple[config.Config, str]], queries: list[schema.Query]) -> list[np.ndarray]:
    """Per arm, the seconds of retrieval and of generation on all cores of this machine, (num_queries, 2)."""
    import torch

    from ragtune_ray.generation.generator import open_generator

    devices.use_reserved_devices()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found, generator, opened = [], None, None
    for settings, version in arms:
        if generator is None or settings.generator != opened:
            generator = None  # free the memory of the previous one first
            generator, opened = open_generator(settings)[0], settings.generator
        with _search(settings, version) if settings.answer.shows_passages else contextlib.nullcontext() as search:
            seconds = [_seconds(query, settings, version, search, generator) for query in [queries[0], *queries]]
        found.append(np.array(seconds[1:]))
    return found


@contextlib.contextmanager
def _search(settings: config.Config, version: str) -> Iterator[Search]:
    """Open an index version, in this process or in one per shard, for the duration of the block."""
    from ragtune_ray.answering import searching
    from ragtune_ray.index.retriever import open_retriever

    retrieval = settings.retrieval
    opened = versions.read_version(settings.workspace, version)
    num_shards = len(snapshot.shards(settings.workspace, opened, settings.cluster.shard_bytes))
    if num_shards > 1:
        with _search_of_shards(settings, version, num_shards) as search:
            yield search
        return
    retriever = open_retriever(settings, version)
    yield lambda texts: searching.search_passages(retriever, [texts], retrieval, retrieval.top_k)[0]


@contextlib.contextmanager
def _search_of_shards(settings: config.Config, version: str, num_shards: int) -> Iterator[Search]:
    import ray

    from ragtune_ray.cluster.serving.divided import DividedIndex, ShardError
    from ragtune_ray.cluster.serving.shard import ShardReplica
    from ragtune_ray.index import retriever
    from ragtune_ray.models.encoder import load_encoder

    visible, top_k = retriever.visible(settings), settings.retrieval.top_k
    encoder = None if settings.retrieval.mode == "lexical" else load_encoder(settings.encoder)
    make = ray.remote(ShardReplica).options(num_cpus=SHARD_CPUS, scheduling_strategy="SPREAD")
    replicas = [make.remote(settings, number, num_shards) for number in range(num_shards)]
    try:
        shards = _shards_of(replicas)
        index = DividedIndex(settings, version, shards, encoder, retriever.load_reranker(settings.retrieval))

        def search(texts: Texts) -> Shown:
            (shown,) = index.search([texts], top_k, visible)
            if isinstance(shown, str):
                raise ShardError(shown)
            return shown

        yield search
    finally:
        for replica in replicas:
            ray.kill(replica)


def _shards_of(replicas: Sequence[Any]) -> Any:
    """Actors of `ShardReplica` as `divided.Shards`, without Serve."""
    from ragtune_ray.cluster.serving import divided

    class Shards(divided.Shards):
        def open_everywhere(self, version: str) -> None:
            self.ask("open", version, seconds=divided.OPENING_SECONDS)

    return Shards([_Handle(replica) for replica in replicas])


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


def _seconds(
    query: schema.Query, settings: config.Config, version: str, search: Search | None, generator: Generator
) -> tuple[float, float]:
    from ragtune_ray.answering import rewriting
    from ragtune_ray.answering.pipeline import Task, answer_tasks

    started = time.perf_counter()
    task = Task(query)
    if search is not None:
        (searches,) = rewriting.write_searches([query], generator, settings)
        passages, scores = search(searches.texts)
        task = Task(query, tuple(passages), tuple(scores), version)
    retrieved = time.perf_counter()
    answer_tasks([task], generator, settings, "")
    return retrieved - started, time.perf_counter() - retrieved
