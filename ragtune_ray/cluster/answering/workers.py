"""The workers of bulk retrieval and answering, which process one unit of queries at a time.

A query that cannot be retrieved or answered becomes a reject or a row with status `failed`. If a unit keeps killing its worker,
its rows are processed one by one to find the row at fault.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, schema
from ragtune_ray.answering import rewriting, searching
from ragtune_ray.answering.pipeline import Task, answer_tasks, failed_answer
from ragtune_ray.answering.searching import Shown
from ragtune_ray.cluster import session, staged_queries, stages
from ragtune_ray.evaluation import scoring
from ragtune_ray.ingest.splits import positives
from ragtune_ray.storage import filesystem
from ragtune_ray.training.examples import Candidates, positive_passage

ATTEMPTS_TOGETHER = 2
"""A unit whose worker died this many times is processed row by row."""
NO_GOLD_PASSAGE = "has no answer that a passage of a relevant document could contain"
"""The end of the error of a query that has no gold passage to show."""

_Asked = tuple[schema.Query, searching.Texts]
Row = TypeVar("Row")
Found = TypeVar("Found")


class RetrieveUnit(stages.UnitWorker):
    """A retriever. With a `directory` it commits hits there; otherwise it passes passages on to the generators.

    With `answer.gold_passage` it passes on the passage that contains the answer, without retrieving.
    """

    def __init__(
        self,
        settings: config.Config,
        version: str,
        queries: str,
        depth: int,
        directory: str | None = None,
        *,
        leave_out_own: bool = False,
        searches: str = "",
    ) -> None:
        from ragtune_ray.index.retriever import open_retriever

        session.use_one_thread()
        self._retriever = open_retriever(settings, version)
        self._cutoffs = settings.evaluate.cutoffs
        self._queries, self._depth, self._directory = queries, depth, directory
        self._gold_passage = settings.answer.gold_passage
        self._leave_out_own = leave_out_own
        self._retrieval, self._searches = settings.retrieval, searches

    def run(self, unit: dict[str, Any]) -> str:
        """Retrieve for a unit of queries."""
        if self._directory is not None:
            return self._commit(unit, self._directory)
        started = time.monotonic()
        retrieved = self._passages(unit)
        return json.dumps({**unit, "retrieved": retrieved, "retrieval_seconds": round(time.monotonic() - started, 4)})

    def _commit(self, unit: dict[str, Any], directory: str) -> str:
        started = time.time()
        rows, asked = read_searches(self._queries, self._searches, self._retrieval, unit)
        found = row_by_row_if_needed(list(zip(rows, asked, strict=True)), self._hits)
        return commit_hits(
            directory,
            unit["unit"],
            rows,
            found,
            self._cutoffs,
            started,
            depth=self._depth,
            num_documents=self._retriever.index.manifest["num_documents"] - self._leave_out_own,
        )

    def _hits(self, asked: Sequence[_Asked]) -> list[list[schema.Hit]]:
        names, texts = [row.query_id for row, _ in asked], [each for _, each in asked]
        left_out = self._leave_out_own
        return searching.search_hits(
            self._retriever, names, texts, self._retrieval, self._depth, leave_out_own=left_out
        )

    def _found(self, asked: Sequence[_Asked]) -> list[Shown]:
        own = [row.query_id for row, _ in asked] if self._leave_out_own else None
        texts = [each for _, each in asked]
        return searching.search_passages(self._retriever, texts, self._retrieval, self._depth, own)

    def _gold(self, asked: Sequence[_Asked]) -> list[Shown]:
        owned = self._retriever.index.of_documents([positives(row) for row, _ in asked])
        return [self._gold_of(row, ordinals) for (row, _), ordinals in zip(asked, owned, strict=True)]

    def _gold_of(self, row: schema.Query, ordinals: np.ndarray) -> Shown:
        passage = positive_passage(row, Candidates(tuple(self._retriever.index.take(ordinals.tolist())), (), ()))
        if passage is None or not row.answers:
            raise ValueError(f"query {row.query_id!r} {NO_GOLD_PASSAGE}")
        return [passage], [1.0]

    def _passages(self, unit: dict[str, Any]) -> list[dict[str, Any]]:
        """Per query: its passages, their scores, and the error if retrieval failed."""
        rows, asked = read_searches(self._queries, self._searches, self._retrieval, unit)
        pairs = list(zip(rows, asked, strict=True))
        found = row_by_row_if_needed(pairs, self._gold if self._gold_passage else self._found)
        return [
            {"passages": [], "scores": [], "error": result}
            if isinstance(result, str)
            else {"passages": [dataclasses.asdict(passage) for passage in result[0]], "scores": result[1], "error": ""}
            for result in found
        ]


def read_searches(
    queries: str, searches: str, retrieval: config.Retrieval, unit: dict[str, Any]
) -> tuple[list[schema.Query], list[searching.Texts]]:
    """The staged queries of a unit, and the texts with which the index is searched for each.

    `searches` is the file that a run of `rewrite` wrote; empty: no generator was needed.
    """
    rows = staged_queries.read_queries(queries, unit["start"], unit["stop"])
    if not searches:
        return rows, [rewriting.begun(row, retrieval).texts for row in rows]
    written = staged_queries.read_rows(searches, unit["start"], unit["stop"], schema.Searches)
    return rows, [each.texts for each in written]


def commit_hits(
    directory: str,
    number: int,
    rows: Sequence[schema.Query],
    found: Sequence[list[schema.Hit] | str],
    cutoffs: Sequence[int],
    started: float,
    *,
    depth: int,
    num_documents: int,
) -> str:
    """Commit a unit of retrieval: `hits.parquet`, `scores.parquet` of queries with qrels, rejects in the summary.

    The summary's `short` counts the queries with qrels whose `depth` hits are from fewer documents than the largest cutoff,
    or than can be found.

    Args:
        directory: of the stage.
        number: of the unit.
        rows: the queries of the unit.
        found: per query, its hits or the reason why retrieval failed.
        cutoffs: the k of the metrics.
        started: Unix time when the unit began.
        depth: hits that were searched for.
        num_documents: documents that can be found.
    """
    hits = [hit for row in found if not isinstance(row, str) for hit in row]
    rejects = [
        schema.Reject(row.query_id, result, "row")
        for row, result in zip(rows, found, strict=True)
        if isinstance(result, str)
    ]
    judged = [row for row in rows if positives(row)]
    scores = scoring.score_retrieval(judged, hits, cutoffs) if judged else {}
    table = pa.Table.from_pylist([{"query_id": query_id, **values} for query_id, values in scores.items()])
    with tempfile.TemporaryDirectory(prefix="ragtune-retrieve-") as temporary:
        paths = {name: Path(temporary) / name for name in ("hits.parquet", "scores.parquet")}
        pq.write_table(schema.to_table(hits, schema.Hit), paths["hits.parquet"], write_page_checksum=True)
        pq.write_table(table, paths["scores.parquet"], write_page_checksum=True)
        return stages.commit_unit(
            directory,
            number,
            paths,
            rejects=[dataclasses.asdict(reject) for reject in rejects],
            short=sum(
                not isinstance(result, str)
                and len(result) == depth
                and len({hit.document_id for hit in result}) < min(max(cutoffs), num_documents)
                for row, result in zip(rows, found, strict=True)
                if positives(row)
            ),
            started=started,
            ended=time.time(),
        )


def row_by_row_if_needed(rows: Sequence[Row], work: Callable[[Sequence[Row]], list[Found]]) -> list[Found | str]:
    """Per row, the result of `work` or the reason why it failed: batches that fail are halved down to single rows."""
    try:
        return [*work(rows)]
    except (ValueError, RuntimeError) as error:
        if len(rows) == 1:
            return [str(error)]
    middle = len(rows) // 2
    return row_by_row_if_needed(rows[:middle], work) + row_by_row_if_needed(rows[middle:], work)


class GenerateUnit(stages.UnitWorker):
    """A generator that answers one unit of queries at a time."""

    def __init__(self, settings: config.Config, version: str, queries: str, directory: str, fingerprint: str) -> None:
        from ragtune_ray.generation.generator import open_generator

        session.use_one_thread()
        self._generator, _ = open_generator(settings)
        self._settings, self._version, self._queries = settings, version, queries
        self._directory, self._fingerprint = directory, fingerprint

    def continues_with(self, arguments: dict[str, Any]) -> bool:
        """Take over other arguments, if their generator is the same."""
        given: config.Config = arguments["settings"]
        if (given.generator, arguments["fingerprint"]) != (self._settings.generator, self._fingerprint):
            return False
        self._settings, self._version, self._queries = given, arguments["version"], arguments["queries"]
        self._directory = arguments["directory"]
        return True

    def run(self, unit: dict[str, Any]) -> str:
        """Answer a unit of queries."""
        started = time.time()
        tasks = self._tasks(unit)
        if stages.begin_attempt(self._directory, unit["unit"]) > ATTEMPTS_TOGETHER:
            answers = [self._answer_alone(unit["unit"], place, task) for place, task in enumerate(tasks)]
        else:
            answers = self._answers(tasks)
        errors = [answer.error for answer in answers if answer.status == "failed"]
        with tempfile.TemporaryDirectory(prefix="ragtune-answer-") as temporary:
            path = Path(temporary) / "answers.parquet"
            pq.write_table(schema.to_table(answers, schema.Answer), path, write_page_checksum=True)
            return stages.commit_unit(
                self._directory,
                unit["unit"],
                {"parquet": path},
                failed=len(errors),
                errors=errors[:3],
                retrieval_seconds=unit.get("retrieval_seconds", 0.0),
                started=started,
                ended=time.time(),
            )

    def _tasks(self, unit: dict[str, Any]) -> list[Task]:
        rows = staged_queries.read_queries(self._queries, unit["start"], unit["stop"])
        if "retrieved" not in unit:
            return [Task(row) for row in rows]
        return [
            Task(
                row,
                tuple(schema.Passage(**passage) for passage in found["passages"]),
                tuple(found["scores"]),
                self._version,
                found["error"],
            )
            for row, found in zip(rows, unit["retrieved"], strict=True)
        ]

    def _answers(self, tasks: Sequence[Task]) -> list[schema.Answer]:
        return answer_tasks(tasks, self._generator, self._settings, self._fingerprint)

    def _answer_alone(self, unit: int, place: int, task: Task) -> schema.Answer:
        """Answer a single row after writing a note: a row with a note but no answer has killed its worker."""
        note = stages.unit_file(self._directory, unit, f"row-{place}.txt")
        finished = stages.unit_file(self._directory, unit, f"row-{place}.parquet")
        if filesystem.exists(finished):
            with filesystem.fetched(finished) as local:
                return next(schema.from_table(pq.read_table(local), schema.Answer))
        if filesystem.exists(note):
            return failed_answer(task, "the worker process died on this row", self._fingerprint)
        filesystem.replace_text(note, "")
        (answer,) = self._answers([task])
        with tempfile.TemporaryDirectory(prefix="ragtune-answer-") as temporary:
            path = Path(temporary) / "answer.parquet"
            pq.write_table(schema.to_table([answer], schema.Answer), path)
            filesystem.commit_file(path, finished)
        return answer
