"""The workers of bulk retrieval and answering, which process one unit of queries at a time.

A query that cannot be retrieved or answered becomes a reject or a row with status `failed`. If a unit keeps killing its worker,
its rows are processed one by one to find the row at fault.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, schema
from ragtune_ray.answering import rewriting, searching
from ragtune_ray.answering.pipeline import Task, answer_tasks, failed_answer
from ragtune_ray.cluster import session, staged_queries, stages
from ragtune_ray.cluster.answering import passages
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
    """A retriever, which commits the hits of its queries and, if `shown` is given, the passages that a job reads."""

    def __init__(
        self,
        settings: config.Config,
        version: str,
        queries: str,
        depth: int,
        directory: str,
        *,
        leave_out_own: bool = False,
        searches: str = "",
        cutoffs: Sequence[int] = (),
        shown: passages.Shown | None = None,
    ) -> None:
        from ragtune_ray.index.retriever import open_retriever

        session.use_one_thread()
        self._retriever = open_retriever(settings, version)
        self._queries, self._depth, self._directory = queries, depth, directory
        self._leave_out_own, self._cutoffs, self._shown = leave_out_own, cutoffs, shown
        self._retrieval, self._searches = settings.retrieval, searches

    def run(self, unit: dict[str, Any]) -> str:
        """Retrieve for a unit of queries."""
        started = time.time()
        rows, asked = read_searches(self._queries, self._searches, self._retrieval, unit)
        found = row_by_row_if_needed(list(zip(rows, asked, strict=True)), self._hits)
        table = None
        if self._shown is not None:
            names = [hit.passage_id for hits in found if not isinstance(hits, str) for hit in hits]
            table = passages.passages_of(self._retriever.index, names, rows, self._shown)
        return commit_hits(
            self._directory,
            unit["unit"],
            rows,
            found,
            self._cutoffs,
            started,
            depth=self._depth,
            num_documents=self._retriever.index.manifest["num_documents"] - self._leave_out_own,
            passages_table=table,
        )

    def _hits(self, asked: Sequence[_Asked]) -> list[list[schema.Hit]]:
        names, texts = [row.query_id for row, _ in asked], [each for _, each in asked]
        left_out = self._leave_out_own
        return searching.search_hits(
            self._retriever, names, texts, self._retrieval, self._depth, leave_out_own=left_out
        )


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
    passages_table: pa.Table | None = None,
) -> str:
    """Commit a unit of retrieval: `hits.parquet`, `scores.parquet` of queries with qrels, rejects in the summary.

    The summary's `short` counts the queries with qrels whose `depth` hits are from fewer documents than the largest cutoff,
    or than can be found.

    Args:
        directory: of the stage.
        number: of the unit.
        rows: the queries of the unit.
        found: per query, its hits or the reason why retrieval failed.
        cutoffs: the k of the metrics; empty: hits are not scored.
        started: Unix time when the unit began.
        depth: hits that were searched for.
        num_documents: documents that can be found.
        passages_table: committed as `passages.parquet`, if given.
    """
    hits = [hit for row in found if not isinstance(row, str) for hit in row]
    rejects = [
        schema.Reject(row.query_id, result, "row")
        for row, result in zip(rows, found, strict=True)
        if isinstance(result, str)
    ]
    judged = [row for row in rows if positives(row)] if cutoffs else []
    scores = scoring.score_retrieval(judged, hits, cutoffs) if judged else {}
    table = pa.Table.from_pylist([{"query_id": query_id, **values} for query_id, values in scores.items()])
    with tempfile.TemporaryDirectory(prefix="ragtune-retrieve-") as temporary:
        paths = {name: Path(temporary) / name for name in ("hits.parquet", "scores.parquet")}
        pq.write_table(schema.to_table(hits, schema.Hit), paths["hits.parquet"], write_page_checksum=True)
        pq.write_table(table, paths["scores.parquet"], write_page_checksum=True)
        if passages_table is not None:
            paths["passages.parquet"] = Path(temporary) / "passages.parquet"
            pq.write_table(passages_table, paths["passages.parquet"], write_page_checksum=True)
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
                if cutoffs and positives(row)
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

    def __init__(
        self,
        settings: config.Config,
        version: str,
        queries: str,
        directory: str,
        fingerprint: str,
        found: passages.Found | None = None,
    ) -> None:
        from ragtune_ray.generation.generator import open_generator

        session.use_one_thread()
        self._generator, _ = open_generator(settings)
        self._settings, self._version, self._queries = settings, version, queries
        self._directory, self._fingerprint = directory, fingerprint
        self._reader = passages.Reader(found) if found else None

    def continues_with(self, arguments: dict[str, Any]) -> bool:
        """Take over other arguments, if their generator is the same."""
        given: config.Config = arguments["settings"]
        if (given.generator, arguments["fingerprint"]) != (self._settings.generator, self._fingerprint):
            return False
        self._settings, self._version, self._queries = given, arguments["version"], arguments["queries"]
        self._directory = arguments["directory"]
        found = arguments.get("found")
        self._reader = passages.Reader(found) if found else None
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
                started=started,
                ended=time.time(),
            )

    def _tasks(self, unit: dict[str, Any]) -> list[Task]:
        rows = staged_queries.read_queries(self._queries, unit["start"], unit["stop"])
        if self._reader is None:
            return [Task(row) for row in rows]
        found = self._reader.of(rows, unit["start"])
        return [self._task(row, each) for row, each in zip(rows, found, strict=True)]

    def _task(self, row: schema.Query, found: passages.OfQuery) -> Task:
        """The query with its hits or, with `answer.gold_passage`, the passage that contains its answer."""
        if not self._settings.answer.gold_passage:
            return Task(row, found.retrieved, found.scores, self._version, found.error)
        gold = positive_passage(row, Candidates(found.gold, (), ()))
        if gold is None or not row.answers:
            return Task(row, (), (), self._version, f"query {row.query_id!r} {NO_GOLD_PASSAGE}")
        return Task(row, (gold,), (1.0,), self._version)

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
