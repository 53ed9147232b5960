"""Measures how long one answer takes when questions are asked one at a time, without a network or batches.

An index larger than `cluster.shard_bytes` is searched as the endpoint does it, by one process per shard.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

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


def measure(arms: Sequence[tuple[config.Config, str]], queries: Sequence[schema.Query]) -> list[Latency]:
    """Answer the queries one at a time in each arm, in a Ray task; a session must be open, and the cluster should be idle.

    Args:
        arms: (config, index version or "" if it does not retrieve) of each arm; consecutive arms with the same generator load
            it once.
        queries: the first one is asked twice per arm, once unmeasured to warm up.
    """
    import ray

    actors.release()
    gpus = max(session.for_generators(settings).gpus_per_worker for settings, _ in arms)
    cluster = arms[0][0].cluster.model_copy(update={"gpus_per_worker": gpus})
    options = {**session.worker_options(cluster), "max_retries": 1}
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
        from ragtune_ray.cluster.serving import shard_actors

        with shard_actors.started(settings, num_shards) as shards:
            index = shard_actors.DividedRetriever(settings, version, shards)
            yield lambda texts: index.search([texts], retrieval.top_k)[0]
        return
    retriever = open_retriever(settings, version)
    yield lambda texts: searching.search_passages(retriever, [texts], retrieval, retrieval.top_k)[0]


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
