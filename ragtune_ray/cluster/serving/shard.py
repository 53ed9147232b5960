"""The replica of one shard of an index that is too large for one process: opens only its segments, and searches them.

Every call names the index version that it is about, so what one request gets from several shards is always of one version. A
version is opened when a call first names it, and closed some time after the last one that does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ragtune_ray import RagtuneError, config, schema
from ragtune_ray.cluster.serving.replicas import prepare_process
from ragtune_ray.index import bm25, filters, retriever, snapshot, versions
from ragtune_ray.serving.backend import without_metadata

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class Opened:
    """The segments of one shard in one index version."""

    index: snapshot.Index
    offset: int
    """The ordinal of its first passage in the whole index."""
    used: float
    """When a call last named it, in monotonic time."""
    frequencies: dict[str, int] = dataclasses.field(default_factory=dict)
    """In how many passages of the whole index each token of the current search occurs."""
    totals: tuple[int, int] | None = None
    """Passages and tokens of the whole index; None until a search has told them."""

    def take(self, ordinals: Sequence[int]) -> list[schema.Passage]:
        """The passages with these ordinals of the whole index, as they are sent."""
        return [without_metadata(each) for each in self.index.take([number - self.offset for number in ordinals])]


@dataclasses.dataclass(frozen=True, slots=True)
class Searched:
    """What a shard finds for some queries."""

    lists: list[retriever.Candidates]
    """Those of `retriever.search_lists`, with ordinals of the whole index."""
    passages: dict[int, schema.Passage]
    """The best passages of this shard, by ordinal. Most hits are among them, which saves another call."""


class ShardReplica:
    """One of the `num_shards` shards of an index."""

    def __init__(self, settings: config.Config, number: int, num_shards: int) -> None:
        limits = settings.serve.retriever
        prepare_process(limits.num_threads or round(limits.num_cpus))
        self._settings, self._number, self._num_shards = settings, number, num_shards
        self._versions: dict[str, Opened] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        try:  # before calls arrive; another version, or this one again, is opened by the first call that names it
            current = versions.current_version(settings.workspace)
            self._versions[current] = self._open(current, None)
        except (RagtuneError, OSError) as error:
            logger.warning("the current index version cannot be opened: %s", error)

    async def open(self, version: str) -> None:
        """Open a version, if it is not open."""
        await self._opened(version)

    async def count(self, version: str, tokens: Sequence[str]) -> bm25.Statistics:
        """The numbers of passages and tokens of this shard, and in how many passages each of these tokens occurs."""
        return await self._in_thread(version, lambda opened: opened.index.lexical.statistics(tokens))

    async def search(
        self,
        version: str,
        texts: Sequence[str],
        embedded: np.ndarray | None,
        depth: int,
        visible: filters.Filter,
        statistics: bm25.Statistics | None,
        num_sent: int,
    ) -> Searched:
        """Search this shard.

        Args:
            version: the index version.
            texts: the queries.
            embedded: their vectors; None in mode `lexical`.
            depth: length of each list.
            visible: which documents may be hits.
            statistics: those of the whole index for the tokens of all queries; None in mode `dense`.
            num_sent: for how many hits of each query to send the passages.
        """
        retrieval = self._settings.retrieval

        def searched(opened: Opened) -> Searched:
            index = opened.index if statistics is None else self._scoring_with(opened, statistics)
            found = retriever.search_lists(index, retrieval, texts, embedded, depth, index.allowed(visible))
            lists = [
                each._replace(ordinals=np.where(each.ordinals >= 0, each.ordinals + opened.offset, -1))
                for each in found
            ]
            ranking = retriever.Ranking(retrieval, None, retriever.unknown_scripts(index.manifest))
            _, best = ranking.rank(texts, lists, num_sent, lambda *_: [])
            sent = np.unique(best[best >= 0]).tolist()
            return Searched(lists, dict(zip(sent, opened.take(sent), strict=True)))

        return await self._in_thread(version, searched)

    async def take(self, version: str, ordinals: Sequence[int]) -> list[schema.Passage]:
        """The passages with these ordinals of the whole index."""
        return await self._in_thread(version, lambda opened: opened.take(ordinals))

    async def list_documents(
        self, version: str, visible: filters.Filter, after: str, limit: int
    ) -> tuple[list[snapshot.ListedDocument], bool]:
        """The documents of this shard; see `snapshot.Index.list_documents`."""
        return await self._in_thread(version, lambda opened: opened.index.list_documents(visible, after, limit))

    async def respond(self) -> None:
        """Show that this replica is alive."""

    async def _in_thread(self, version: str, work: Callable[[Opened], Result]) -> Result:
        opened = await self._opened(version)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, opened)

    async def _opened(self, version: str) -> Opened:
        while version not in self._versions:
            if version not in self._opening:
                self._opening[version] = asyncio.create_task(self._open_beside(version))
            await asyncio.shield(self._opening[version])  # a caller that gives up does not end it
        opened = self._versions[version]
        opened.used = time.monotonic()
        return opened

    async def _open_beside(self, version: str) -> None:
        """Open a version in addition to the one in use, whose segments it shares, and close those that nothing uses."""
        try:
            latest = max(self._versions.values(), key=lambda opened: opened.used, default=None)
            opened = await asyncio.to_thread(self._open, version, latest)
            # A request that is still running has named its version within the time that a request may take.
            oldest = time.monotonic() - 2 * self._settings.serve.timeout_seconds
            kept = {name: each for name, each in self._versions.items() if each is latest or each.used > oldest}
            self._versions = {**kept, version: opened}
        finally:
            del self._opening[version]

    def _open(self, name: str, latest: Opened | None) -> Opened:
        workspace = self._settings.workspace
        version = versions.read_version(workspace, name)
        places = snapshot.divided(version, self._num_shards)[self._number]
        offset = sum(entry.num_passages for entry in version.entries[: places[0] if places else 0])
        index = snapshot.open_index(workspace, name, reuse=latest.index if latest else None, shard=places)
        return Opened(index, offset, time.monotonic())

    def _scoring_with(self, opened: Opened, statistics: bm25.Statistics) -> snapshot.Index:
        """The open version, whose BM25 scores are those of the whole index."""
        totals = (statistics.num_passages, statistics.num_tokens)
        if opened.totals != totals:
            index = opened.index
            given = bm25.Statistics(*totals, opened.frequencies)
            lexical = snapshot.lexical_index(index.manifest, index.segments, index.alive, given)
            opened.index, opened.totals = dataclasses.replace(index, lexical=lexical), totals
        opened.frequencies.clear()
        opened.frequencies.update(statistics.frequencies)
        return opened.index
