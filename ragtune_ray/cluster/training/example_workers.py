"""Makes training examples from a unit of queries.

Out: per unit, a file of examples and, for objectives that keep the index, the stored vectors of their passages.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, schema
from ragtune_ray.answering import searching
from ragtune_ray.cluster import session, staged_queries, stages
from ragtune_ray.cluster.answering import passages
from ragtune_ray.cluster.answering.workers import read_searches
from ragtune_ray.index import versions
from ragtune_ray.models import loading, weights
from ragtune_ray.training import examples, teaching

if TYPE_CHECKING:
    from ragtune_ray.models.encoder import Encoder


VALIDATION_HITS = 10
"""Hits per query that a reranker orders in validation."""


def searched_with(settings: config.Config) -> config.Config:
    """The config whose hits become examples; a reranker is trained on hits that no reranker ordered."""
    return settings.with_values({"retrieval.reranker": ""}) if settings.training.objective == "reranker" else settings


class Near(NamedTuple):
    """The neighbors of positive passages: hits for the texts of these passages."""

    queries: str
    """URL of the staged texts; their ids are those of the passages."""
    found: passages.Found


class PrepareUnit(stages.UnitWorker):
    """Makes examples from what was found for the queries; it loads only the models that the objective needs."""

    def __init__(
        self,
        settings: config.Config,
        version: str,
        staged: str,
        split: str,
        directory: str,
        searches: str = "",
        found: passages.Found | None = None,
        near: Near | None = None,
    ) -> None:
        session.use_one_thread()
        self._settings, self._staged, self._split, self._directory = settings, staged, split, directory
        self._searches = searches
        self._asked: dict[str, searching.Texts] = {}
        """Query id -> the texts with which the index is searched, for the unit in work."""
        self._sft = settings.training.objective == "sft"
        self._reader = passages.Reader(found) if found else None
        self._near, self._near_reader = near, passages.Reader(near.found) if near else None
        self._encoder = _encoder(settings, version) if found and not self._sft else None
        self._count_tokens = _token_counter(settings)
        self._chat = _chat(settings) if settings.training.trains_generator else None
        self._reranker = _teaching_reranker(settings)
        # Validation measures the rank of the positive passage, which needs no teacher.
        self._generator = None if split == "validation" else _teaching_generator(settings)

    def run(self, unit: dict[str, Any]) -> str:
        """Make the examples of a unit of queries."""
        rows, asked = read_searches(self._staged, self._searches, self._settings.retrieval, unit)
        self._asked = {row.query_id: texts for row, texts in zip(rows, asked, strict=True)}
        failed: list[schema.Reject] = []
        found: list[examples.Candidates] = []
        vectors: Mapping[str, np.ndarray] = {}
        if self._reader is not None:
            all_found = list(zip(rows, self._reader.of(rows, unit["start"]), strict=True))
            failed = [schema.Reject(row.query_id, each.error, "row") for row, each in all_found if each.error]
            rows = [row for row, each in all_found if not each.error]
            vectors = self._reader.vectors(unit["start"], unit["stop"])
            found = self._candidates(rows, [each for _, each in all_found if not each.error], vectors)
            if self._near is not None:
                found = self._with_neighbors(rows, found, *unit["near"])
        made, judgements = self._examples(rows, found)
        kept = [item for item in made if not isinstance(item, schema.Reject)]
        rejects = [dataclasses.asdict(item) for item in [*failed, *made] if isinstance(item, schema.Reject)]
        with tempfile.TemporaryDirectory(prefix="ragtune-examples-") as temporary:
            files = {"examples.parquet": Path(temporary) / "examples.parquet"}
            table = schema.to_table(kept, examples.example_type(self._settings.training))
            pq.write_table(table, files["examples.parquet"], write_page_checksum=True)
            if self._settings.training.keeps_index:
                files["pool.parquet"] = Path(temporary) / "pool.parquet"
                pq.write_table(_pool(kept, vectors), files["pool.parquet"], write_page_checksum=True)
            judged = [dataclasses.asdict(each) for each in judgements]
            return stages.commit_unit(
                self._directory, unit["unit"], files, num_examples=len(kept), rejects=rejects, judgements=judged
            )

    def _examples(
        self, rows: Sequence[schema.Query], found: Sequence[examples.Candidates]
    ) -> tuple[list[Any], list[teaching.Judgement]]:
        """Per row, an example or a reject; and the generator's judgements if it is the teacher."""
        if self._generator is not None:
            return self._taught(rows, found, self._generator)
        if self._reader is None:
            assert self._chat is not None
            kind: schema.ExampleKind = "replay" if self._split == "replay" else "question_only"
            return [examples.generator_example(row, None, self._chat, self._settings, kind) for row in rows], []
        return [self._plain_example(row, candidates) for row, candidates in zip(rows, found, strict=True)], []

    def _taught(
        self, rows: Sequence[schema.Query], found: Sequence[examples.Candidates], generator: Any
    ) -> tuple[list[Any], list[teaching.Judgement]]:
        count = self._settings.training.hard_negatives + 1
        chosen = [
            (row, teaching.choose_candidates(row, candidates, count))
            for row, candidates in zip(rows, found, strict=True)
            if row.answers and candidates.retrieved
        ]
        gains_of = teaching.passage_gains(chosen, generator, self._settings)
        scored = {row.query_id: (passages, gains) for (row, passages), gains in zip(chosen, gains_of, strict=True)}
        made: list[Any] = []
        judgements = []
        for row, candidates in zip(rows, found, strict=True):
            passages, gains = scored.get(row.query_id, ([], "has no answer to ask the generator about"))
            if isinstance(gains, str):
                made.append(schema.Reject(row.query_id, gains, "row"))
                continue
            searched = self._as_searched(row)
            scores = self._reranker(searched.text, [each.text for each in passages]) if self._reranker else None
            example, judgement = teaching.taught_example(
                searched, candidates, passages, gains, self._settings, self._count_tokens, reranker_scores=scores
            )
            made.append(example)
            judgements.append(judgement)
        return made, judgements

    def _as_searched(self, row: schema.Query) -> schema.Query:
        """The query with the text that encoder and reranker see when the index is searched."""
        return dataclasses.replace(row, text=self._texts(row)[0])

    def _texts(self, row: schema.Query) -> searching.Texts:
        return self._asked.get(row.query_id, (row.text,))

    def _plain_example(self, row: schema.Query, candidates: examples.Candidates) -> Any:
        settings, chat, searched = self._settings, self._chat, self._as_searched(row)
        if settings.training.objective == "reranker":
            ranks_hits = self._split == "validation"
            return examples.reranker_example(searched, candidates, settings, self._count_tokens, ranks_hits=ranks_hits)
        if chat is None:
            return examples.retriever_example(searched, candidates, settings, self._count_tokens, self._reranker)
        if self._sft:
            return examples.generator_example(row, candidates, chat, settings)
        count = settings.training.hard_negatives + 1
        example = examples.joint_example(row, teaching.choose_candidates(row, candidates, count), chat, settings)
        return example if isinstance(example, schema.Reject) else dataclasses.replace(example, query=searched.text)

    def _candidates(
        self, rows: Sequence[schema.Query], found: Sequence[passages.OfQuery], vectors: Mapping[str, np.ndarray]
    ) -> list[examples.Candidates]:
        from ragtune_ray.index.retriever import encode_queries

        if self._encoder is None or not rows:
            return [examples.Candidates(each.gold, each.retrieved, each.scores) for each in found]
        embedded = encode_queries(self._encoder, [self._texts(row)[0] for row in rows])

        def cosines(near: Sequence[schema.Passage], query: np.ndarray) -> tuple[float, ...]:
            return tuple((np.array([vectors[each.passage_id] for each in near]) @ query).tolist()) if near else ()

        return [
            examples.Candidates(
                each.gold,
                each.retrieved,
                each.scores,
                gold_cosines=cosines(each.gold, query),
                retrieved_cosines=cosines(each.retrieved, query),
            )
            for each, query in zip(found, embedded, strict=True)
        ]

    def _with_neighbors(
        self, rows: Sequence[schema.Query], found: Sequence[examples.Candidates], start: int, stop: int
    ) -> list[examples.Candidates]:
        """Add the neighbors of each query's positive passage, which are in rows `start` to `stop` of `near`."""
        assert self._near is not None
        assert self._near_reader is not None
        asked = staged_queries.read_queries(self._near.queries, start, stop)
        near: dict[str, tuple[schema.Passage, ...]] = {}
        for query, each in zip(asked, self._near_reader.of(asked, start), strict=True):
            if each.error:
                raise ValueError(f"the neighbors of passage {query.query_id} were not found: {each.error}")
            near[query.query_id] = tuple(passage for passage in each.retrieved if passage.passage_id != query.query_id)
        golds = [examples.positive_passage(row, candidates) for row, candidates in zip(rows, found, strict=True)]
        return [
            dataclasses.replace(candidates, neighbors=near[gold.passage_id]) if gold else candidates
            for candidates, gold in zip(found, golds, strict=True)
        ]


def depth_of(settings: config.Config, split: str) -> int:
    """Number of hits to choose passages from: more than needed, because some answer the query and cannot distract."""
    training = settings.training
    if training.objective == "reranker" and split == "validation":
        return VALIDATION_HITS
    sft = training.objective == "sft"
    return 4 * (training.passages or settings.retrieval.top_k) if sft else training.negative_depth


def _pool(made: Sequence[schema.RetrieverExample | schema.JointExample], vectors: Mapping[str, np.ndarray]) -> pa.Table:
    """The passage_id and stored vector of each distinct passage of the examples, in the order of the index."""
    shown = {name for example in made for name in example.passage_ids}
    names = [name for name in vectors if name in shown]
    dimension = len(next(iter(vectors.values()), ()))
    return pool_table(names, np.array([vectors[name] for name in names], np.float32).reshape(len(names), dimension))


def pool_table(names: Sequence[str], vectors: np.ndarray) -> pa.Table:
    """A table of passage ids and their vectors (num_passages, dimension)."""
    return pa.table({"passage_id": pa.array(names, pa.string()), "vector": passages.vector_column(vectors)})


def _encoder(settings: config.Config, version: str) -> Encoder:
    """The encoder that matches the stored vectors."""
    from ragtune_ray.index.retriever import check_encoder
    from ragtune_ray.models.encoder import load_encoder

    encoder = load_encoder(settings.encoder)
    check_encoder(encoder, version, versions.read_version(settings.workspace, version).manifest)
    return encoder


def _chat(settings: config.Config) -> examples.ChatText:
    from ragtune_ray.generation.chat import ChatTokenizer

    directory = weights.weights_of(weights.resolve(settings.generator.model))
    chat = ChatTokenizer(loading.load_tokenizer(directory))
    return examples.ChatText(lambda texts: [len(ids) for ids in chat.encode(texts)], chat.render)


def _token_counter(settings: config.Config) -> Any:
    from ragtune_ray.models.encoder import load_token_counter

    counter = load_token_counter(settings.encoder)

    def count(texts: Sequence[str]) -> list[int]:
        return [min(len(spans), counter.max_tokens) for spans in counter.token_spans(list(texts))]

    return count


def _teaching_reranker(settings: config.Config) -> Any:
    """The reranker's scoring function if it is a teacher, otherwise None."""
    training = settings.training
    learns = training.objective == "distillation" or training.learns_from_generator
    if not learns or not settings.retrieval.reranker:
        return None
    from ragtune_ray.models.reranker import Reranker

    reranker = Reranker(settings.retrieval.reranker)
    return lambda query, texts: reranker.score([(query, text) for text in texts]).tolist()


def _teaching_generator(settings: config.Config) -> Any:
    if not settings.training.learns_from_generator:
        return None
    from ragtune_ray.generation.generator import open_generator

    return open_generator(settings).generator
