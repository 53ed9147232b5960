"""The retriever replica of Ray Serve: searches the published index version and hot-swaps to newer ones.

It opens the whole index, or none of it and asks the shards among which it is divided (`divided`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from ray import serve

from ragtune_ray import config
from ragtune_ray.answering import searching
from ragtune_ray.cluster.answering.workers import row_by_row_if_needed
from ragtune_ray.cluster.serving.divided import DividedIndex, ShardError, Shards
from ragtune_ray.cluster.serving.replicas import TRIAL_QUESTION, SwappingReplica, prepare_process
from ragtune_ray.index import filters, retention, snapshot, versions
from ragtune_ray.serving.backend import TOO_LATE, Embedded, Failed, Found, Listed, without_metadata
from ragtune_ray.serving.hot_swap import HotSwap
from ragtune_ray.serving.openai.embeddings import embedding_model
from ragtune_ray.storage import artifacts

if TYPE_CHECKING:
    from ragtune_ray.models.encoder import Encoder
    from ragtune_ray.models.reranker import Reranker

BATCH_QUERIES = 32
SWITCH_SECONDS = 0.0005
"""How long a thread waits for Python's lock, instead of 5 milliseconds, which is as long as a call to a shard takes."""
EMBEDDED_TEXTS = 32
"""How many texts are embedded at once; queries wait for no more than these."""

_Query: TypeAlias = tuple[searching.Texts, int, filters.Filter, float]
"""(texts, top_k, filter, deadline in monotonic time)."""
logger = logging.getLogger(__name__)


class WholeIndex:
    """An index version that is open in this process."""

    def __init__(
        self, settings: config.Config, opened: snapshot.Index, encoder: Encoder | None, reranker: Reranker | None
    ) -> None:
        self.opened, self.num_passages = opened, opened.num_passages
        self._retrieval, self._encoder, self._reranker = settings.retrieval, encoder, reranker

    def search(
        self, asked: Sequence[searching.Texts], top_k: int, visible: filters.Filter
    ) -> list[searching.Shown | str]:
        """The passages of each question and their scores, best first, or why it cannot be searched for."""
        from ragtune_ray.index.retriever import Retriever

        retriever = Retriever(self.opened, self._encoder, self._retrieval, self._reranker, visible)
        return row_by_row_if_needed(
            asked, lambda some: searching.search_passages(retriever, some, self._retrieval, top_k)
        )

    def list_documents(
        self, visible: filters.Filter, after: str, limit: int
    ) -> tuple[list[snapshot.ListedDocument], bool]:
        """A page of documents, and whether more follow."""
        return self.opened.list_documents(visible, after, limit)


@dataclass(frozen=True, slots=True)
class _OpenVersion:
    """An open index version; `hold` keeps `ragtune gc` from deleting it."""

    index: WholeIndex | DividedIndex
    hold: contextlib.ExitStack
    needed_shards: int = 0
    """How many shards `cluster.shard_bytes` demands for it; 0 if the config gives their number."""


class RetrieverReplica(SwappingReplica):
    """Encoder and index, or the handles of its shards, in one process. Queries that arrive together are searched together."""

    def __init__(
        self, settings: config.Config, shards: Sequence[Any] = (), models: Mapping[str, str] | None = None
    ) -> None:
        limits = settings.serve.retriever
        prepare_process(limits.num_threads or round(limits.num_cpus), models)
        from ragtune_ray.index.retriever import load_reranker
        from ragtune_ray.models.encoder import load_encoder

        self._settings = settings
        self._encoder = None if settings.retrieval.mode == "lexical" else load_encoder(settings.encoder)
        self._reranker = load_reranker(settings.retrieval)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retrieve")
        self._shards, self._num_shards = Shards(shards), max(1, len(shards))
        if shards:  # the calls to them are made by other threads, while this one encodes
            sys.setswitchinterval(SWITCH_SECONDS)
        self._current = self._thread.submit(self._first_version).result()  # a thread, since it may wait for the shards
        self._current.poll(settings.serve.poll_seconds)

    def _first_version(self) -> HotSwap[_OpenVersion]:
        workspace = self._settings.workspace
        return HotSwap(
            "index version",
            latest=lambda: versions.current_version(workspace),
            load=self._open,
            release=lambda opened: opened.hold.close(),
            fallbacks=lambda: versions.list_versions(workspace)[::-1],
        )

    async def retrieve(
        self, texts: searching.Texts, top_k: int, visible: filters.Filter, seconds: float
    ) -> Found | Failed:
        """The hits of one query, all from one index version; those of several texts are fused."""
        return await self._retrieve_batch((texts, top_k, visible, time.monotonic() + seconds))  # type: ignore[no-any-return]

    async def embed(self, texts: Sequence[str], input_type: str) -> Embedded | Failed:
        """The embeddings of texts."""
        model = embedding_model(self._settings)
        if self._encoder is None or model is None:
            return Failed(409, "this endpoint has no encoder, because retrieval.mode is lexical", "no_encoder")
        encode = self._encoder.encode_queries if input_type == "query" else self._encoder.encode_passages
        loop, pieces, num_tokens = asyncio.get_running_loop(), [], 0
        for start in range(0, len(texts), EMBEDDED_TEXTS):  # between two pieces, waiting queries are searched
            piece = list(texts[start : start + EMBEDDED_TEXTS])
            pieces.append(await loop.run_in_executor(self._thread, encode, piece))
            num_tokens += await loop.run_in_executor(self._thread, self._num_tokens, piece)
        return Embedded(np.concatenate(pieces), model, num_tokens)

    def _num_tokens(self, texts: list[str]) -> int:
        """How many tokens of the texts the encoder reads."""
        from ragtune_ray.models.encoder import load_token_counter

        counter = load_token_counter(self._settings.encoder)
        counts = (len(spans) + counter.num_added_tokens for spans in counter.token_spans(texts))
        return sum(min(count, counter.max_tokens) for count in counts)

    async def list_documents(self, visible: filters.Filter, after: str, limit: int) -> Listed | Failed:
        """A page of the documents of the index version in use."""

        def listed() -> Listed | Failed:
            with self._current.lease() as lease:
                try:
                    documents, has_more = lease.resource.index.list_documents(visible, after, limit)
                except artifacts.ArtifactError:
                    message = (
                        "this index was written by an earlier version and cannot be listed; run: ragtune index CONFIG"
                    )
                    return Failed(409, message, "index_too_old")
                except ShardError as error:
                    return _unavailable(error)
                return Listed(lease.name, tuple(documents), has_more)

        return await asyncio.get_running_loop().run_in_executor(self._thread, listed)

    async def status(self) -> dict[str, Any]:
        """The index version in use, the refused version if any, and the state of the shards."""
        status: dict[str, Any] = {"index_version": self._current.name, "refused": self._refused()}
        with self._current.lease() as lease:
            needed = lease.resource.needed_shards
        if self._shards or needed > self._num_shards:
            status |= {"num_shards": self._num_shards, "needed_shards": needed or self._num_shards}
        if self._shards:
            status["silent_shards"] = [number + 1 for number in await self._shards.silent()]
        return status

    @serve.batch(max_batch_size=BATCH_QUERIES, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
    async def _retrieve_batch(self, queries: list[_Query]) -> list[Found | Failed]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._retrieve_all, queries)

    def _retrieve_all(self, queries: list[_Query]) -> list[Found | Failed]:
        """Search queries of equal top_k and filter together; one lease, so that all results are from one index version."""
        results: list[Found | Failed] = [TOO_LATE] * len(queries)
        groups: dict[tuple[int, filters.Filter], list[int]] = {}
        now = time.monotonic()
        for row, (_, top_k, visible, deadline) in enumerate(queries):
            if deadline > now:
                groups.setdefault((top_k, visible), []).append(row)
        with self._current.lease() as lease:
            for (top_k, visible), rows in groups.items():
                started = time.monotonic()
                try:
                    found = lease.resource.index.search([queries[row][0] for row in rows], top_k, visible)
                except ShardError as error:
                    for row in rows:
                        results[row] = _unavailable(error)
                    continue
                seconds = time.monotonic() - started
                for row, hits in zip(rows, found, strict=True):
                    results[row] = (
                        Failed(422, "this query cannot be encoded", "query_not_encodable")
                        if isinstance(hits, str)
                        else Found(lease.name, tuple(map(without_metadata, hits[0])), tuple(hits[1]), seconds)
                    )
        return results

    def _open(self, name: str, previous: _OpenVersion | None) -> _OpenVersion:
        """Open and test an index version; the previous one is still in use."""
        hold = contextlib.ExitStack()
        try:
            hold.enter_context(retention.held(self._settings.workspace, name))
            index = self._opened(name, previous.index if previous else None)
            self._test(name, index)
            needed = self._needed_shards(name)
        except BaseException:
            hold.close()
            raise
        return _OpenVersion(index, hold, needed)

    def _opened(self, name: str, previous: WholeIndex | DividedIndex | None) -> WholeIndex | DividedIndex:
        settings = self._settings
        if self._shards:
            divided = previous if isinstance(previous, DividedIndex) else None
            return DividedIndex(settings, name, self._shards, self._encoder, self._reranker, divided)
        reused = previous.opened if isinstance(previous, WholeIndex) else None
        opened = snapshot.open_index(settings.workspace, name, reuse=reused)
        return WholeIndex(settings, opened, self._encoder, self._reranker)

    def _needed_shards(self, name: str) -> int:
        """How many shards `cluster.shard_bytes` demands; 0 if the config gives their number. Warns if there are fewer."""
        settings = self._settings
        if settings.serve.retriever.shards:
            return 0
        version = versions.read_version(settings.workspace, name)
        needed = len(snapshot.shards(settings.workspace, version, settings.cluster.shard_bytes))
        if needed > self._num_shards:
            logger.warning(
                "index version %s needs %d shards of cluster.shard_bytes=%d, but the endpoint has %d, which now open more than "
                "that; start or deploy it again",
                *(name, needed, settings.cluster.shard_bytes, self._num_shards),
            )
        return needed

    def _test(self, name: str, index: WholeIndex | DividedIndex) -> None:
        (found,) = index.search([(TRIAL_QUESTION,)], 1, filters.Filter())
        if isinstance(found, str) or (index.num_passages and self._encoder is not None and not found[0]):
            raise artifacts.ArtifactError(f"index version {name}: a test query returns no hits")


def _unavailable(error: ShardError) -> Failed:
    logger.warning("a request fails: %s", error)
    return Failed(503, "a part of the index is not available; try again later", "unavailable", 2)
