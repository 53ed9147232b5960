"""Ray Serve: the copy that retrieves.

In: queries, with what they may find. Out: hits, all of one index version. It follows the version that is published; what a client
may not see of a failure stays in the log of the copy, without the question. This module knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

from ray import serve

from ragtune_ray import config, schema
from ragtune_ray.cluster.answering.workers import row_by_row_if_needed
from ragtune_ray.cluster.serving.replicas import TOO_LATE, TRIAL_QUESTION, Following, prepare_process, refusal_of
from ragtune_ray.index import filters, retention, snapshot, versions
from ragtune_ray.serving.backend import Embedded, Failed, Found, as_sent
from ragtune_ray.serving.following import Follower
from ragtune_ray.storage import artifacts

__all__ = ["RetrieverReplica"]

BATCH_QUERIES = 32

Wanted: TypeAlias = tuple[str, int, filters.Filter, float]
"""A query: text, top_k, filter, and the time (monotonic) after which nobody waits for it."""


@dataclass(frozen=True, slots=True)
class _OpenVersion:
    """An index version that cannot be removed from the workspace while it is held here."""

    index: snapshot.Index
    hold: contextlib.ExitStack


class RetrieverReplica(Following):
    """Encoder and index in one process. Queries that come together are searched together."""

    def __init__(self, settings: config.Config) -> None:
        limits = settings.serve.retriever
        prepare_process(limits.num_threads or round(limits.num_cpus))
        from ragtune_ray.index.retriever import load_reranker
        from ragtune_ray.models.encoder import load_encoder

        self._settings = settings
        self._encoder = None if settings.retrieval.mode == "lexical" else load_encoder(settings.encoder)
        self._reranker = load_reranker(settings.retrieval)
        self._work = ThreadPoolExecutor(1, thread_name_prefix="retrieve")
        workspace = settings.workspace
        self._follower = Follower(
            "index version",
            latest=lambda: versions.current_version(workspace),
            load=self._open,
            release=lambda opened: opened.hold.close(),
            fallbacks=lambda: versions.list_versions(workspace)[::-1],
        )
        self._follower.follow(settings.serve.poll_seconds)

    async def retrieve(self, text: str, top_k: int, chosen: filters.Filter, seconds: float) -> Found | Failed:
        """The hits of one query, all of one version."""
        return await self._retrieve_batch((text, top_k, chosen, time.monotonic() + seconds))  # type: ignore[no-any-return]

    async def embed(self, texts: Sequence[str], input_type: str) -> Embedded | Failed:
        """Vectors of texts."""
        if self._encoder is None:
            return Failed(409, "this endpoint retrieves without an encoder (retrieval.mode is lexical)", "no_encoder")
        encode = self._encoder.encode_queries if input_type == "query" else self._encoder.encode_passages
        vectors = await asyncio.get_running_loop().run_in_executor(self._work, encode, list(texts))
        num_tokens = sum(len(text.split()) for text in texts)
        return Embedded(vectors, self._settings.encoder.model.rstrip("/").rsplit("/", 1)[-1], num_tokens)

    async def refresh(self) -> str:
        """Look for a new version now, even one that was refused; the version that serves then."""
        await asyncio.to_thread(self._follower.refresh, again=True)
        return self._follower.name

    async def status(self) -> dict[str, Any]:
        """Which version serves, and which was refused."""
        return {"index_version": self._follower.name, "refused": refusal_of(self._follower)}

    @serve.batch(max_batch_size=BATCH_QUERIES, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
    async def _retrieve_batch(self, wanted: list[Wanted]) -> list[Found | Failed]:
        return await asyncio.get_running_loop().run_in_executor(self._work, self._retrieve_all, wanted)

    def _retrieve_all(self, wanted: list[Wanted]) -> list[Found | Failed]:
        """Queries that may see the same are searched together; one lease, so all of a response is of one version."""
        results: list[Found | Failed] = [TOO_LATE] * len(wanted)
        groups: dict[tuple[int, filters.Filter], list[int]] = {}
        now = time.monotonic()
        for place, (_, top_k, chosen, deadline) in enumerate(wanted):
            if deadline > now:
                groups.setdefault((top_k, chosen), []).append(place)
        with self._follower.lease() as lease:
            for (top_k, chosen), places in groups.items():
                started = time.monotonic()
                found = self._search(lease.held.index, [wanted[place][0] for place in places], top_k, chosen)
                seconds = time.monotonic() - started
                for place, row in zip(places, found, strict=True):
                    results[place] = (
                        Failed(422, "this query cannot be encoded", "query_not_encodable")
                        if isinstance(row, str)
                        else Found(lease.name, tuple(map(as_sent, row[0])), tuple(row[1]), seconds)
                    )
        return results

    def _search(
        self, opened: snapshot.Index, texts: list[str], top_k: int, chosen: filters.Filter
    ) -> list[tuple[list[schema.Passage], list[float]] | str]:
        from ragtune_ray.index.retriever import Retriever

        retriever = Retriever(opened, self._encoder, self._settings.retrieval, self._reranker, chosen)
        return row_by_row_if_needed(texts, lambda some: retriever.retrieve_passages(some, top_k))

    def _open(self, name: str, before: _OpenVersion | None) -> _OpenVersion:
        """Open a version beside the one that serves, and try it."""
        hold = contextlib.ExitStack()
        try:
            hold.enter_context(retention.held(self._settings.workspace, name))
            opened = snapshot.open_index(self._settings.workspace, name, reuse=before.index if before else None)
            self._try(opened)
        except BaseException:
            hold.close()
            raise
        return _OpenVersion(opened, hold)

    def _try(self, opened: snapshot.Index) -> None:
        (found,) = self._search(opened, [TRIAL_QUESTION], 1, filters.Filter())
        if isinstance(found, str) or (opened.num_passages and self._encoder is not None and not found[0]):
            raise artifacts.ArtifactError(f"index version {opened.version}: a trial query finds nothing in it")
