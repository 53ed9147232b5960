"""Bulk retrieval from an index that is too large for one process: searches every shard and merges the results.

It writes the same files as retrieval from the whole index, in four stages, each of which can be resumed:

    encode   per unit of queries    their vectors, and the tokens that BM25 needs
    count    per shard              document frequencies of these tokens; not in dense mode
    search   per shard and unit     the shard's best passages: scores, ordinals over all shards, ids
    merge    per unit of queries    the best passages of all shards; fused, reranked, scored

No process opens more than one shard. Until the run is published, its work directory contains `depth` scores and ordinals (16
bytes per passage) for each query, shard and list, and the ids (for a reranker also the texts) of the passages.

BM25 and the exact kind (`flat`) return the same hits as the whole index, to the last bit; so do `ivf` and `hnsw` if nothing is
deleted or filtered out. Otherwise approximate kinds may order near ties differently, because each shard decides for itself: it
nominates its own candidates for exact re-scoring (`ivf_sq`, `ivf_pq`), chooses how many lists to probe by the share of its own
passages that the filter allows, and falls back to a full scan if its own result is too short.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, schema
from ragtune_ray.answering import searching
from ragtune_ray.cluster import runs, session, stages
from ragtune_ray.cluster.answering.workers import commit_hits, read_searches, row_by_row_if_needed
from ragtune_ray.index import bm25, retriever, segments, snapshot, versions, words
from ragtune_ray.models.encoder import load_encoder
from ragtune_ray.storage import checksums, filesystem


@dataclass(frozen=True, slots=True)
class Job:
    """What the workers of all stages need."""

    settings: config.Config
    version: str
    queries: str
    """URL of the staged queries."""
    num_units: int
    """Number of units of queries."""
    top_k: int
    """Hits per query."""
    shards: tuple[tuple[int, ...], ...]
    """Per shard, the positions of its segments in the version."""
    work: str
    """Parent of the directories of all stages except `merge`."""
    hits: str
    """Directory of `merge`."""
    own_passages: int = 0
    """Extra hits to find, since those of the document with the query's id are left out; 0: nothing is left out."""
    searches: str = ""
    """The texts that a generator wrote for the searches; see `workers.read_searches`."""
    fuses: bool = False
    """Whether a query may be searched with several texts, whose hits are fused."""
    cutoffs: tuple[int, ...] = ()
    """The k of the metrics of the hits; empty: they are not scored."""

    def stage(self, name: str) -> str:
        """Directory of a stage. All but `encode` depend on the division into shards."""
        if name == "encode":
            return filesystem.join(self.work, name)
        return filesystem.join(self.work, f"{name}-{checksums.digest(self.shards)[:16]}")

    def search_unit(self, shard: int, unit: int) -> int:
        """The unit number of `search` for a shard and a unit of queries; the units of one shard are consecutive."""
        return shard * self.num_units + unit

    @property
    def mode(self) -> config.RetrievalMode:
        """The config's retrieval mode."""
        return self.settings.retrieval.mode

    @property
    def depth(self) -> int:
        """Number of passages per query in each list that is merged."""
        retrieval = self.settings.retrieval
        return retriever.list_depth(retrieval, self.ranked + self.own_passages, reranks=bool(retrieval.reranker))

    @property
    def ranked(self) -> int:
        """Number of hits of each search, before those of one query are fused."""
        return max(self.top_k, self.settings.retrieval.candidates) if self.fuses else self.top_k

    def asked(self, unit: dict[str, Any]) -> tuple[list[schema.Query], list[searching.Texts], list[str]]:
        """The queries of a unit, the texts to search for each, and all these texts in a row."""
        rows, asked = read_searches(self.queries, self.searches, self.settings.retrieval, unit)
        return rows, asked, [text for each in asked for text in each]


def scatter_gather(job: Job, units: Sequence[dict[str, Any]]) -> tuple[list[stages.Summary], list[stages.Summary]]:
    """Run the four stages; returns the summaries of `merge`, which equal those of plain retrieval, and of all stages."""
    encoded = _run(job, "encode", job.stage("encode"), EncodeUnit, units, holds_model=job.mode != "lexical")
    counted: list[stages.Summary] = []
    if job.mode != "dense":
        numbered = [{"unit": number} for number in range(len(job.shards))]
        counted = _run(job, "count", job.stage("count"), CountUnit, numbered, holds_model=False)
    pairs = [
        {**unit, "unit": job.search_unit(shard, unit["unit"]), "queries": unit["unit"], "shard": shard}
        for shard in range(len(job.shards))
        for unit in units
    ]
    searched = _run(job, "search", job.stage("search"), SearchUnit, pairs, holds_model=False)
    merged = _run(job, "merge", job.hits, MergeUnit, units, holds_model=bool(job.settings.retrieval.reranker))
    return merged, [*encoded, *counted, *searched, *merged]


def _run(
    job: Job, name: str, directory: str, worker: type, units: Sequence[dict[str, Any]], *, holds_model: bool
) -> list[stages.Summary]:
    cluster = job.settings.cluster
    if not holds_model:
        cluster = cluster.model_copy(update={"gpus_per_worker": 0.0})
    counted = "shards" if name == "count" else "queries"
    return runs.run_over_queries(name, directory, units, worker, {"job": job}, cluster, counted=counted)


@dataclass(frozen=True, slots=True)
class _Encoded:
    """What `encode` records about the texts of a unit of queries, in addition to the vectors."""

    batches: list[int]
    """Per text, the number of its batch; -1 if encoding failed. Texts encoded together are searched together, as in
    retrieval from the whole index, because the last bit of a matrix product depends on the batch."""
    errors: list[str]
    """Per text, why encoding failed; "" if it did not."""
    tokens: list[str]
    """The distinct tokens of the unit, sorted; empty in dense mode."""

    def together(self) -> list[list[int]]:
        """The rows of each batch."""
        rows: dict[int, list[int]] = {}
        for row, batch in enumerate(self.batches):
            if batch >= 0:
                rows.setdefault(batch, []).append(row)
        return list(rows.values())


def _read_encoded(job: Job, unit: int) -> _Encoded:
    return _Encoded(**json.loads(filesystem.read_text(stages.unit_file(job.stage("encode"), unit, "encoded"))))


class EncodeUnit(stages.UnitWorker):
    """Encodes units of queries."""

    def __init__(self, job: Job) -> None:
        session.use_one_thread()
        self._job = job
        manifest = versions.read_version(job.settings.workspace, job.version).manifest
        self._words = versions.words_of(manifest)
        self._dimension = int(manifest["encoder"]["dimension"])
        self._encoder = None
        if job.mode != "lexical":
            self._encoder = load_encoder(job.settings.encoder)
            retriever.check_encoder(self._encoder, job.version, manifest)

    def run(self, unit: dict[str, Any]) -> str:
        """Encode a unit of queries."""
        started = time.time()
        *_, texts = self._job.asked(unit)
        numbers = itertools.count()
        found = row_by_row_if_needed(texts, lambda some: self._encode(some, next(numbers)))
        sound = [None if isinstance(each, str) else each for each in found]
        encoded = _Encoded(
            batches=[-1 if each is None else each[0] for each in sound],
            errors=[each if isinstance(each, str) else "" for each in found],
            tokens=sorted({token for each in sound if each is not None for token in each[2]}),
        )
        embedded = np.zeros((len(texts), self._dimension), dtype=np.float32)
        for row, each in enumerate(sound):
            if each is not None and each[1] is not None:
                embedded[row] = each[1]
        with tempfile.TemporaryDirectory(prefix="ragtune-encode-") as temporary:
            files = {"encoded": Path(temporary) / "encoded"}
            files["encoded"].write_text(json.dumps(dataclasses.asdict(encoded)), encoding="utf-8")
            if self._encoder is not None:
                files["npz"] = Path(temporary) / "vectors.npz"
                np.savez(files["npz"], vectors=embedded)
            directory = self._job.stage("encode")
            return stages.commit_unit(directory, unit["unit"], files, started=started, ended=time.time())

    def _encode(self, texts: Sequence[str], batch: int) -> list[tuple[int, np.ndarray | None, list[str]]]:
        embedded = [None] * len(texts) if self._encoder is None else retriever.encode_queries(self._encoder, texts)
        dense = self._job.mode == "dense"
        tokens = [[]] * len(texts) if dense else words.tokens(texts, self._words)
        return [(batch, vector, row) for vector, row in zip(embedded, tokens, strict=True)]


class OneShard:
    """Opens shards of an index version, at most one at a time."""

    def __init__(self, workspace: str, version: str, shards: Sequence[Sequence[int]]) -> None:
        self._workspace, self._version, self._shards = workspace, version, shards
        self._number = -1
        self._opened: snapshot.Index | None = None

    def open(self, number: int, statistics: bm25.Statistics | None = None) -> snapshot.Index:
        """Close any other shard and open this one."""
        if self._opened is None or number != self._number:
            self._opened = None
            gc.collect()  # an open index is in a reference cycle (its filter cache)
            shard = self._shards[number]
            self._opened = snapshot.open_index(self._workspace, self._version, shard=shard, statistics=statistics)
            self._number = number
        return self._opened


class CountUnit(stages.UnitWorker):
    """Counts in how many passages of a shard each token of the queries occurs."""

    def __init__(self, job: Job) -> None:
        session.use_one_thread()
        self._job = job
        self._shard = OneShard(job.settings.workspace, job.version, job.shards)

    @functools.cached_property
    def _tokens(self) -> set[str]:
        tokens: set[str] = set()
        for unit in range(self._job.num_units):
            tokens.update(_read_encoded(self._job, unit).tokens)
        return tokens

    def run(self, unit: dict[str, Any]) -> str:
        """Count the tokens of all queries in a shard."""
        started = time.time()
        counted = self._shard.open(unit["unit"]).lexical.statistics(self._tokens)
        with tempfile.TemporaryDirectory(prefix="ragtune-count-") as temporary:
            path = Path(temporary) / "statistics"
            path.write_text(json.dumps(dataclasses.asdict(counted)), encoding="utf-8")
            directory, files = self._job.stage("count"), {"statistics": path}
            return stages.commit_unit(directory, unit["unit"], files, started=started, ended=time.time())


def _read_statistics(job: Job) -> bm25.Statistics:
    """The sum of all shards' statistics, with at most two of them in memory."""
    files = (stages.unit_file(job.stage("count"), number, "statistics") for number in range(len(job.shards)))
    each = (bm25.Statistics(**json.loads(filesystem.read_text(file))) for file in files)
    return functools.reduce(lambda one, other: bm25.add_statistics([one, other]), each)


class SearchUnit(stages.UnitWorker):
    """Searches one shard after another, a unit of queries at a time."""

    def __init__(self, job: Job) -> None:
        session.use_one_thread()
        self._job = job
        self._shard = OneShard(job.settings.workspace, job.version, job.shards)
        self._visible = retriever.visible(job.settings)
        entries = versions.read_version(job.settings.workspace, job.version).entries
        first = np.cumsum([0, *(entry.num_passages for entry in entries)])
        self._offsets = [int(first[shard[0]]) for shard in job.shards]
        self._columns = ["passage_id", "document_id", *(["text"] if job.settings.retrieval.reranker else [])]

    @functools.cached_property
    def _statistics(self) -> bm25.Statistics | None:
        return None if self._job.mode == "dense" else _read_statistics(self._job)

    def run(self, unit: dict[str, Any]) -> str:
        """Search a shard for a unit of queries."""
        started = time.time()
        opened = self._shard.open(unit["shard"], self._statistics)
        scores, ordinals, others = self._search(opened, unit)
        found = np.unique(ordinals[ordinals >= 0])
        offset = self._offsets[unit["shard"]]
        passages = segments.take_rows(opened.passages.select(self._columns), found)
        passages = passages.append_column("ordinal", pa.array(found + offset, pa.int64()))
        with tempfile.TemporaryDirectory(prefix="ragtune-search-") as temporary:
            files = {"npz": Path(temporary) / "lists.npz", "parquet": Path(temporary) / "passages.parquet"}
            numbers = np.where(ordinals >= 0, ordinals + offset, -1)
            np.savez(files["npz"], scores=scores, ordinals=numbers, others=others)
            pq.write_table(passages, files["parquet"], write_page_checksum=True)
            directory = self._job.stage("search")
            return stages.commit_unit(directory, unit["unit"], files, started=started, ended=time.time())

    def _search(self, opened: snapshot.Index, unit: dict[str, Any]) -> retriever.Candidates:
        """The lists of the shard, each array (num_lists, num_queries, depth); -inf and -1 where encoding failed."""
        job = self._job
        *_, texts = job.asked(unit)
        embedded = None
        if job.mode != "lexical":
            embedded = _load(stages.unit_file(job.stage("encode"), unit["queries"], "npz"))["vectors"]
        shape = (2 if job.mode == "hybrid" else 1, len(texts), job.depth)
        found = retriever.Candidates(
            np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
        )
        allowed = opened.allowed(self._visible)
        for rows in _read_encoded(job, unit["queries"]).together():
            some, near = [texts[row] for row in rows], None if embedded is None else embedded[rows]
            lists = retriever.search_lists(opened, job.settings.retrieval, some, near, job.depth, allowed)
            for whole, parts in zip(found, zip(*lists, strict=True), strict=True):
                whole[:, rows] = np.stack(parts)
        return found


class MergeUnit(stages.UnitWorker):
    """Merges the results of all shards into hits."""

    def __init__(self, job: Job) -> None:
        session.use_one_thread()
        self._job = job
        manifest = versions.read_version(job.settings.workspace, job.version).manifest
        self._ranking = retriever.load_ranking(job.settings.retrieval, manifest)
        self._num_documents = manifest["num_documents"] - bool(job.own_passages)

    def run(self, unit: dict[str, Any]) -> str:
        """Merge the hits of a unit of queries."""
        started = time.time()
        rows, asked, texts = self._job.asked(unit)
        owners = [row.query_id for row, each in zip(rows, asked, strict=True) for _ in each]
        encoded = _read_encoded(self._job, unit["unit"])
        lists = self._merged(unit["unit"])
        column = self._passages(unit["unit"], np.unique(np.concatenate([each.ordinals.ravel() for each in lists])))

        def hits(numbers: Sequence[int]) -> list[list[schema.Hit]]:
            some = [retriever.Candidates(*(array[numbers] for array in each)) for each in lists]
            names = [owners[number] for number in numbers]
            depth = self._job.ranked
            ranked = self._ranking.rank(
                [texts[number] for number in numbers], some, depth + self._job.own_passages, column
            )
            if self._job.own_passages:
                ranked = retriever.without_own(names, ranked, depth, column)
            return retriever.to_hits(names, *ranked, column)

        found: list[list[schema.Hit] | str] = [*encoded.errors]
        for numbers in encoded.together():
            results = row_by_row_if_needed(numbers, hits)
            for number, result in zip(numbers, results, strict=True):
                found[number] = result
        return commit_hits(
            self._job.hits,
            unit["unit"],
            rows,
            [self._fused(each) for each in searching.grouped(found, asked)],
            self._job.cutoffs,
            started,
            depth=self._job.top_k,
            num_documents=self._num_documents,
        )

    def _fused(self, searched: list[list[schema.Hit] | str]) -> list[schema.Hit] | str:
        """The hits of a query from those of its searches, or why one of these failed."""
        error = next((each for each in searched if isinstance(each, str)), None)
        if error is not None:
            return error
        hits = [each for each in searched if not isinstance(each, str)]
        return searching.fuse_hits(hits, self._job.settings.retrieval.fusion_constant, self._job.top_k)

    def _files(self, unit: int, suffix: str) -> list[str]:
        """Per shard, the file that `search` wrote for a unit of queries."""
        numbers = [self._job.search_unit(shard, unit) for shard in range(len(self._job.shards))]
        return [stages.unit_file(self._job.stage("search"), number, suffix) for number in numbers]

    def _merged(self, unit: int) -> list[retriever.Candidates]:
        """The lists of all shards, merged one shard at a time."""
        best: list[retriever.Candidates] = []
        for file in self._files(unit, "npz"):
            found = _load(file)
            lists = [
                retriever.Candidates(*each)
                for each in zip(found["scores"], found["ordinals"], found["others"], strict=True)
            ]
            if best:
                pairs = zip(best, lists, strict=True)
                best = [retriever.merge_candidates(one, other, self._job.depth) for one, other in pairs]
            else:
                best = lists
        return best

    def _passages(self, unit: int, ordinals: np.ndarray) -> Callable[[str, np.ndarray], list[str]]:
        """A function that looks up a column of these passages by ordinal."""
        tables = []
        for file in self._files(unit, "parquet"):
            with filesystem.fetched(file) as path:
                table = pq.read_table(path, page_checksum_verification=True)
            tables.append(table.filter(pa.array(np.isin(np.asarray(table["ordinal"]), ordinals))))
        passages = pa.concat_tables(tables)  # already sorted by ordinal
        known = np.asarray(passages["ordinal"])

        def column(name: str, ordinals: np.ndarray) -> list[str]:
            rows = segments.take_rows(passages.select([name]), np.searchsorted(known, ordinals))
            values: list[str] = rows[name].to_pylist()
            return values

        return column


def _load(url: str) -> dict[str, np.ndarray]:
    with filesystem.fetched(url) as path, np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
