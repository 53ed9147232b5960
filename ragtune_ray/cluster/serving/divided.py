"""Searches an index that is divided among shard replicas: asks all of them, and merges what they find.

The hits and scores are those of the undivided index: BM25 uses the statistics of all shards together, lists are merged before
they are fused or reranked, and all calls of a request name one index version. If a shard does not answer, the request fails:
hits of the other shards alone would look complete.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from ragtune_ray import RagtuneError, config, schema
from ragtune_ray.answering import searching
from ragtune_ray.cluster.answering.workers import row_by_row_if_needed
from ragtune_ray.cluster.serving.replicas import ATTEMPTS, BACKOFF_SECONDS, DIED
from ragtune_ray.cluster.serving.shard import Searched
from ragtune_ray.index import bm25, filters, retriever, snapshot, versions, words
from ragtune_ray.models.encoder import Encoder
from ragtune_ray.models.reranker import Reranker

SHARD_SECONDS = 5.0
"""How long a request waits for a shard, for instance for a replica that replaces a dead one."""
OPENING_SECONDS = 3600.0
"""How long a shard may take to fetch and open its segments."""
PROBE_SECONDS = 2.0
KEPT_FREQUENCIES = 2**20
"""How many tokens' document frequencies are kept per open version."""

logger = logging.getLogger(__name__)


class ShardError(RagtuneError):
    """A shard does not answer."""


@dataclass(slots=True)
class _Call:
    shard: int
    send: Callable[[], Any]
    response: Any
    num_attempts: int = 1


class Shards:
    """Calls methods of `ShardReplica` on several shards at once, through their Serve handles; not in an event loop."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = tuple(handles)

    def __len__(self) -> int:
        return len(self._handles)

    def begin(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> list[_Call]:
        """Call a method on the shards with these numbers, each with its arguments."""
        sends = {number: self._sender(number, method, given) for number, given in arguments.items()}
        return [_Call(number, send, send()) for number, send in sends.items()]

    def replies(self, calls: Sequence[_Call], seconds: float = SHARD_SECONDS) -> dict[int, Any]:
        """The reply of each shard.

        Raises:
            ShardError: a shard did not reply in time, or cannot.
        """
        deadline = time.monotonic() + seconds
        try:
            return {call.shard: self._reply(call, deadline) for call in calls}
        except BaseException:
            for call in calls:
                call.response.cancel()
            raise

    def ask(self, method: str, *arguments: Any, seconds: float = SHARD_SECONDS) -> list[Any]:
        """The replies of all shards to one call, in their order; raises as `replies`."""
        calls = self.begin(method, dict.fromkeys(range(len(self)), arguments))
        return list(self.replies(calls, seconds).values())

    def open_everywhere(self, version: str) -> None:
        """Open a version in every replica of every shard; raises as `replies` if a shard has none that can."""
        self.ask("open", version, seconds=OPENING_SECONDS)  # waits for a replica, where there is none yet
        for response in [handle.broadcast("open", version) for handle in self._handles]:
            for error in response.results(timeout_s=OPENING_SECONDS, return_exceptions=True):
                if error is not None:  # that replica opens it at the first call that names it
                    logger.warning("a replica of a shard cannot open index version %s: %s", version, error)

    async def silent(self) -> list[int]:
        """The numbers of the shards that do not answer."""
        answers = await asyncio.gather(*map(self._answers, self._handles))
        return [number for number, answers_now in enumerate(answers) if not answers_now]

    @staticmethod
    async def _answers(handle: Any) -> bool:
        response = handle.respond.remote()
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await response
        except (TimeoutError, *DIED, RayError, RayServeException):
            response.cancel()
            return False
        return True

    def _sender(self, number: int, method: str, arguments: tuple[Any, ...]) -> Callable[[], Any]:
        return lambda: getattr(self._handles[number], method).remote(*arguments)

    def _reply(self, call: _Call, deadline: float) -> Any:
        where = f"shard {call.shard + 1} of {len(self)}"
        while True:
            try:
                return call.response.result(timeout_s=max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise ShardError(f"{where} does not answer") from None
            except DIED:
                if call.num_attempts == ATTEMPTS:
                    raise ShardError(f"no replica of {where} can be reached") from None
                time.sleep(BACKOFF_SECONDS * 2 ** (call.num_attempts - 1))
                call.num_attempts += 1
                call.response = call.send()
            except (RayError, RayServeException) as error:
                logger.error("%s cannot answer: %s: %s", where, type(error).__name__, error)  # noqa: TRY400  # its trace is in the text
                raise ShardError(f"{where} cannot answer") from error


class DividedIndex:
    """An index version that is open in all shards. It has the methods of an undivided version of `RetrieverReplica`."""

    def __init__(
        self,
        settings: config.Config,
        name: str,
        shards: Shards,
        encoder: Encoder | None,
        reranker: Reranker | None,
        previous: DividedIndex | None = None,
    ) -> None:
        version = versions.read_version(settings.workspace, name)
        self.version, self.num_passages = name, version.manifest["num_passages"]
        self._shards, self._encoder, self._retrieval = shards, encoder, settings.retrieval
        self._rules = versions.words_of(version.manifest)
        unknown = retriever.unknown_scripts(version.manifest)
        self._ranking = retriever.Ranking(settings.retrieval, reranker, unknown)
        if encoder is not None:
            retriever.check_encoder(encoder, name, version.manifest)
        sizes = [
            sum(version.entries[place].num_passages for place in places)
            for places in snapshot.divided(version, len(shards))
        ]
        self._ends = np.cumsum(sizes)
        shards.open_everywhere(name)
        self._totals = bm25.Statistics(0, 0, {})
        if settings.retrieval.mode != "dense":
            tokens = list(previous.frequencies) if previous is not None else []  # questions will use them again
            self._totals = bm25.add_statistics(shards.ask("count", name, tokens, seconds=OPENING_SECONDS))
        self.frequencies: dict[str, int] = dict(self._totals.frequencies)
        """In how many passages each token of the questions so far occurs."""

    def search(
        self, asked: Sequence[searching.Texts], top_k: int, visible: filters.Filter
    ) -> list[searching.Shown | str]:
        """The passages of each question and their scores, best first, or why it cannot be searched for.

        Raises:
            ShardError: a shard does not answer.
        """
        texts = [text for each in asked for text in each]
        depth = top_k if len(texts) == len(asked) else max(top_k, self._retrieval.candidates)
        tokens = set() if self._retrieval.mode == "dense" else set().union(*words.tokens(texts, self._rules))
        counting = self._begin_counting(tokens)
        vectors = row_by_row_if_needed(texts, self._vectors)  # while the shards count
        statistics = self._counted(tokens, counting)
        found: list[searching.Shown | str] = [each if isinstance(each, str) else ([], []) for each in vectors]
        sound = [row for row, each in enumerate(vectors) if not isinstance(each, str)]
        if sound:
            some = [texts[row] for row in sound]
            embedded = None if self._encoder is None else np.stack([vectors[row] for row in sound])
            for row, shown in zip(sound, self._ranked(some, embedded, depth, visible, statistics), strict=True):
                found[row] = shown
        return [self._fused(each, top_k) for each in searching.grouped(found, asked)]

    def list_documents(
        self, visible: filters.Filter, after: str, limit: int
    ) -> tuple[list[snapshot.ListedDocument], bool]:
        """A page of documents, and whether more follow; raises as `search`."""
        return snapshot.merge_listed(self._shards.ask("list_documents", self.version, visible, after, limit), limit)

    def _vectors(self, texts: Sequence[str]) -> list[Any]:
        if self._encoder is None:
            return [None] * len(texts)
        return list(retriever.encode_queries(self._encoder, texts))

    def _begin_counting(self, tokens: AbstractSet[str]) -> list[_Call]:
        """Ask the shards for the frequencies of tokens that are not known."""
        if len(self.frequencies) > KEPT_FREQUENCIES:
            self.frequencies = {}
        unknown = sorted(tokens - self.frequencies.keys())
        return (
            self._shards.begin("count", dict.fromkeys(range(len(self._shards)), (self.version, unknown)))
            if unknown
            else []
        )

    def _counted(self, tokens: AbstractSet[str], counting: Sequence[_Call]) -> bm25.Statistics | None:
        """BM25's statistics of the whole index; None in mode `dense`."""
        if self._retrieval.mode == "dense":
            return None
        if counting:
            counted = bm25.add_statistics(list(self._shards.replies(counting).values()))
            self.frequencies.update(counted.frequencies)
        return dataclasses.replace(self._totals, frequencies={token: self.frequencies[token] for token in tokens})

    def _ranked(
        self,
        texts: Sequence[str],
        embedded: np.ndarray | None,
        top_k: int,
        visible: filters.Filter,
        statistics: bm25.Statistics | None,
    ) -> list[searching.Shown | str]:
        depth = self._ranking.depth(top_k)
        num_sent = max(top_k, self._retrieval.num_reranked) if self._retrieval.reranker else top_k
        searched: list[Searched] = self._shards.ask(
            "search", self.version, texts, embedded, depth, visible, statistics, num_sent
        )
        lists = [_merged(each, depth) for each in zip(*(shard.lists for shard in searched), strict=True)]
        known = {ordinal: passage for shard in searched for ordinal, passage in shard.passages.items()}

        def column(name: str, ordinals: np.ndarray) -> list[str]:
            self._fetch(ordinals, known)
            return [getattr(known[ordinal], name) for ordinal in ordinals.tolist()]

        def ranked(rows: Sequence[int]) -> list[retriever.Ranked]:
            some = [retriever.Candidates(*(array[rows] for array in each)) for each in lists]
            scores, ordinals = self._ranking.rank([texts[row] for row in rows], some, top_k, column)
            return list(zip(scores, ordinals, strict=True))

        results = row_by_row_if_needed(list(range(len(texts))), ranked)
        best = [each[1][each[1] >= 0] for each in results if not isinstance(each, str)]
        self._fetch(np.concatenate([np.empty(0, np.int64), *best]), known)
        return [each if isinstance(each, str) else _shown(*each, known) for each in results]

    def _fetch(self, ordinals: np.ndarray, known: dict[int, schema.Passage]) -> None:
        """Add the passages with these ordinals to those that are known."""
        missing = np.array(sorted(set(ordinals.tolist()) - known.keys()), dtype=np.int64)
        owners = np.searchsorted(self._ends, missing, side="right")
        wanted = {int(owner): missing[owners == owner].tolist() for owner in np.unique(owners)}
        calls = self._shards.begin("take", {owner: (self.version, some) for owner, some in wanted.items()})
        for owner, passages in self._shards.replies(calls).items():
            known.update(zip(wanted[owner], passages, strict=True))

    def _fused(self, found: Sequence[searching.Shown | str], top_k: int) -> searching.Shown | str:
        """The hits of one question from those of its texts, or why one of these cannot be searched for."""
        error = next((each for each in found if isinstance(each, str)), None)
        if error is not None:
            return error
        shown = [each for each in found if not isinstance(each, str)]
        return searching.fuse_passages(shown, self._retrieval.fusion_constant, top_k)


def _merged(found: Sequence[retriever.Candidates], depth: int) -> retriever.Candidates:
    """One list of several shards' lists of the same search."""
    best = found[0]
    for other in found[1:]:
        best = retriever.merge_candidates(best, other, depth)
    return best


def _shown(scores: np.ndarray, ordinals: np.ndarray, known: Mapping[int, schema.Passage]) -> searching.Shown:
    found = ordinals >= 0
    return [known[ordinal] for ordinal in ordinals[found].tolist()], scores[found].tolist()
