"""Makes training examples from a unit of queries.

Out: per unit, a file of examples and, for objectives that keep the index, the stored vectors of their passages.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, schema
from ragtune_ray.answering import searching
from ragtune_ray.cluster import session, stages
from ragtune_ray.cluster.answering.workers import read_searches
from ragtune_ray.index import segments
from ragtune_ray.ingest import splits
from ragtune_ray.models import loading, weights
from ragtune_ray.training import examples, teaching

if TYPE_CHECKING:
    from ragtune_ray.index.retriever import Retriever
    from ragtune_ray.models.encoder import Encoder


VALIDATION_HITS = 10
"""Hits per query that a reranker orders in validation."""


def searched_with(settings: config.Config) -> config.Config:
    """The config whose hits become examples; a reranker is trained on hits that no reranker ordered."""
    return settings.with_values({"retrieval.reranker": ""}) if settings.training.objective == "reranker" else settings


class PrepareUnit(stages.UnitWorker):
    """Makes examples; it loads only the models that the objective needs."""

    def __init__(
        self,
        settings: config.Config,
        version: str,
        staged: str,
        split: str,
        directory: str,
        leave_out_own: bool = False,
        searches: str = "",
    ) -> None:
        from ragtune_ray.index.retriever import open_retriever

        session.use_one_thread()
        self._settings, self._staged, self._split, self._directory = settings, staged, split, directory
        self._leave_out_own, self._searches = leave_out_own, searches
        self._asked: dict[str, searching.Texts] = {}
        """Query id -> the texts with which the index is searched, for the unit in work."""
        self._sft = settings.training.objective == "sft"
        self._retriever = open_retriever(searched_with(settings), version) if version and split != "replay" else None
        self._encoder = _encoder(settings, self._retriever) if self._retriever and not self._sft else None
        self._count_tokens = _token_counter(settings)
        self._chat = _chat(settings) if settings.training.trains_generator else None
        self._reranker = _teaching_reranker(settings)
        # Validation measures the rank of the positive passage, which needs no teacher.
        self._generator = None if split == "validation" else _teaching_generator(settings)

    def run(self, unit: dict[str, Any]) -> str:
        """Make the examples of a unit of queries."""
        rows, asked = read_searches(self._staged, self._searches, self._settings.retrieval, unit)
        self._asked = {row.query_id: texts for row, texts in zip(rows, asked, strict=True)}
        made, judgements = self._examples(rows)
        kept = [item for item in made if not isinstance(item, schema.Reject)]
        rejects = [dataclasses.asdict(item) for item in made if isinstance(item, schema.Reject)]
        with tempfile.TemporaryDirectory(prefix="ragtune-examples-") as temporary:
            files = {"examples.parquet": Path(temporary) / "examples.parquet"}
            table = schema.to_table(kept, examples.example_type(self._settings.training))
            pq.write_table(table, files["examples.parquet"], write_page_checksum=True)
            if self._settings.training.keeps_index:
                files["pool.parquet"] = Path(temporary) / "pool.parquet"
                pq.write_table(self._pool(kept), files["pool.parquet"], write_page_checksum=True)
            judged = [dataclasses.asdict(each) for each in judgements]
            return stages.commit_unit(
                self._directory, unit["unit"], files, num_examples=len(kept), rejects=rejects, judgements=judged
            )

    def _examples(self, rows: Sequence[schema.Query]) -> tuple[list[Any], list[teaching.Judgement]]:
        """Per row, an example or a reject; and the generator's judgements if it is the teacher."""
        if self._generator is not None:
            return self._taught(rows, self._candidates(rows), self._generator)
        return self._plain_examples(rows), []

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

    def _plain_examples(self, rows: Sequence[schema.Query]) -> list[Any]:
        settings, chat = self._settings, self._chat
        if self._retriever is None:
            assert chat is not None
            kind: schema.ExampleKind = "replay" if self._split == "replay" else "question_only"
            return [examples.generator_example(row, None, chat, settings, kind) for row in rows]
        found = self._candidates(rows)
        if settings.training.distractors == "passage" and self._sft:
            found = self._with_neighbors(rows, found)
        return [self._plain_example(row, candidates) for row, candidates in zip(rows, found, strict=True)]

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

    def _depth(self) -> int:
        """Number of hits to choose passages from: more than needed, because some answer the query and cannot distract."""
        training = self._settings.training
        if training.objective == "reranker" and self._split == "validation":
            return VALIDATION_HITS
        return 4 * (training.passages or self._settings.retrieval.top_k) if self._sft else training.negative_depth

    def _candidates(self, rows: Sequence[schema.Query]) -> list[examples.Candidates]:
        from ragtune_ray.index.retriever import encode_queries

        assert self._retriever is not None
        asked = [self._texts(row) for row in rows]
        own = [row.query_id for row in rows] if self._leave_out_own else None
        found = searching.search_ordinals(self._retriever, asked, self._settings.retrieval, self._depth(), own)
        gold = self._retriever.index.of_documents([splits.positives(row) for row in rows])
        embedded = encode_queries(self._encoder, [texts[0] for texts in asked]) if self._encoder else None
        candidates = []
        for number in range(len(rows)):
            hits, scores = np.array(found[number][0], dtype=np.int64), found[number][1]
            cosines: list[tuple[float, ...]] = [(), ()]
            if embedded is not None:
                vectors = (self._retriever.index.vectors.take(places) for places in (gold[number], hits))
                cosines = [tuple((each @ embedded[number]).tolist()) for each in vectors]
            gold_passages, retrieved = (
                tuple(self._retriever.index.take(places.tolist())) for places in (gold[number], hits)
            )
            candidates.append(
                examples.Candidates(
                    gold_passages, retrieved, tuple(scores), gold_cosines=cosines[0], retrieved_cosines=cosines[1]
                )
            )
        return candidates

    def _with_neighbors(
        self, rows: Sequence[schema.Query], found: Sequence[examples.Candidates]
    ) -> list[examples.Candidates]:
        """Add the neighbors of each query's positive passage, retrieved once per distinct passage."""
        assert self._retriever is not None
        golds = [examples.positive_passage(row, candidates) for row, candidates in zip(rows, found, strict=True)]
        texts = {gold.passage_id: gold.text for gold in golds if gold is not None}
        hits = self._retriever.retrieve_passages(list(texts.values()), self._depth())
        near = {
            name: tuple(passage for passage in passages if passage.passage_id != name)
            for name, (passages, _) in zip(texts, hits, strict=True)
        }
        return [
            dataclasses.replace(candidates, neighbors=near[gold.passage_id]) if gold else candidates
            for candidates, gold in zip(found, golds, strict=True)
        ]

    def _pool(self, made: Sequence[schema.RetrieverExample | schema.JointExample]) -> pa.Table:
        """The passage_id and stored vector of each distinct passage of the examples."""
        assert self._retriever is not None
        names = list(dict.fromkeys(name for example in made for name in example.passage_ids))
        documents = [[schema.document_id_of(name)] for name in names]
        index = self._retriever.index
        ordinals = np.unique(np.concatenate([np.empty(0, np.int64), *index.of_documents(documents)]))
        found = segments.take_rows(index.passages.select(["passage_id"]), ordinals)["passage_id"].to_pylist()
        shown = set(names)
        kept = np.array([name in shown for name in found], dtype=bool)
        return pool_table([name for name in found if name in shown], index.vectors.take(ordinals[kept]))


def pool_table(names: Sequence[str], vectors: np.ndarray) -> pa.Table:
    """A table of passage ids and their vectors (num_passages, dimension)."""
    rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), vectors.shape[1])
    return pa.table({"passage_id": pa.array(names, pa.string()), "vector": rows})


def _encoder(settings: config.Config, retriever: Retriever) -> Encoder:
    """The encoder that matches the stored vectors: the retriever's, or loaded here if retrieval is lexical."""
    from ragtune_ray.index.retriever import check_encoder
    from ragtune_ray.models.encoder import load_encoder

    if retriever.encoder is not None:
        return retriever.encoder
    encoder = load_encoder(settings.encoder)
    check_encoder(encoder, retriever.index.version, retriever.index.manifest)
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
