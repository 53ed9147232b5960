"""Grades the answers of all arms together by the metrics of `evaluate.metrics`; what was graded before is not graded again."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow.parquet as pq

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import actors, runs, session, stages
from ragtune_ray.cluster.grading.workers import GradeUnit
from ragtune_ray.evaluation.grading import graders
from ragtune_ray.evaluation.grading.cache import Grades
from ragtune_ray.evaluation.grading.task import Grade, GradingError, Task
from ragtune_ray.index import contents
from ragtune_ray.storage import artifacts, checksums

UNIT_TASKS = 32
"""Answers that are graded together; a killed run loses at most this many grades per worker."""
FIRST_FAILURES = 32
"""If so many grades fail and none succeeds, grading stops: a server that is down would be asked for hours.

Where other grades are known, it stops only once more have failed than `evaluate.max_failed_grades` allows.
"""

Column = dict[str, str]
"""Name of a text column of `scores.parquet` -> its value for one question."""


@dataclass(slots=True)
class Graded:
    """What grading adds to the scores of each arm."""

    values: dict[str, dict[str, dict[str, float]]]
    """Arm -> query id -> metric -> value; a metric is left out where a grade failed in any arm."""
    columns: dict[str, dict[str, Column]]
    """Arm -> query id -> METRIC_status and METRIC_reason."""
    facts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Metric -> how many answers were graded, how many grades were known or failed, requests and tokens."""

    def failed(self) -> list[tuple[str, str, str]]:
        """Metric, arm and query id of each grade that failed, sorted."""
        return sorted(
            (name.removesuffix("_status"), arm, query_id)
            for arm, by_query in self.columns.items()
            for query_id, column in by_query.items()
            for name, status in column.items()
            if name.endswith("_status") and status == "failed"
        )


@dataclass(frozen=True, slots=True)
class _Arm:
    """The answers of one arm, with the passages in their prompts."""

    rows: dict[str, schema.Answer]
    """Query id -> answer."""
    texts: dict[str, str]
    """Passage id -> text; empty if no metric reads passages."""


def grade(settings: config.Config, queries: Sequence[schema.Query], answered: Mapping[config.Arm, str]) -> Graded:
    """Grade the answers to these queries by every metric of `evaluate.metrics`.

    Args:
        settings: of the evaluation; the workspace keeps the grades.
        queries: that are scored.
        answered: arm -> its run of `answer`.

    Raises:
        GradingError: a model is not named, too many grades failed, or a passage is no longer in the index.
        ModelError: a model cannot be found or loaded.
    """
    found = Graded(
        {arm: {query.query_id: {} for query in queries} for arm in answered},
        {arm: {query.query_id: {} for query in queries} for arm in answered},
    )
    if settings.evaluate.metrics:
        graders.require_models(settings)
        reads_passages = settings.evaluate.scores_without_gold
        arms = {arm: _read(run, with_passages=reads_passages) for arm, run in answered.items()}
        with session.ray_session(settings.cluster):
            for metric in settings.evaluate.metrics:
                _grade_by(settings, metric, queries, arms, found)
    return found


def _read(run: str, *, with_passages: bool) -> _Arm:
    path = artifacts.open_artifact(run, "answer").path
    rows = {row.query_id: row for row in schema.from_table(pq.read_table(path / "answers.parquet"), schema.Answer)}
    names = {name for row in rows.values() for name in row.passage_ids}
    if not with_passages or not names:
        return _Arm(rows, {})
    workspace = run.rpartition("/runs/")[0]
    version = runs.living_version(workspace, runs.read_manifest(run))
    found = contents.passages_by_id(workspace, names, version)
    texts = {name: passage.text for name, passage in found.items()}
    if missing := names - texts.keys():
        raise GradingError(
            f"{run}: {len(missing):,} passages of its prompts are not in index version {version}, such as {min(missing)!r}, so "
            "its answers cannot be checked against them; remove this run and answer again"
        )
    return _Arm(rows, texts)


def _evidence(arms: Mapping[config.Arm, _Arm], query_id: str) -> tuple[str, ...]:
    """The passages that the first arm that retrieves was shown for a question."""
    for each in arms.values():
        if names := each.rows[query_id].passage_ids:
            return tuple(each.texts[name] for name in dict.fromkeys(names) if name in each.texts)
    return ()


def _grade_by(
    settings: config.Config,
    metric: config.GradedMetric,
    queries: Sequence[schema.Query],
    arms: Mapping[config.Arm, _Arm],
    found: Graded,
) -> None:
    evidence = {query.query_id: _evidence(arms, query.query_id) for query in queries}
    given = {
        (arm, query.query_id): graders.task_of(
            metric, query, each.rows[query.query_id], each.texts, evidence[query.query_id]
        )
        for arm, each in arms.items()
        for query in queries
    }
    tasks = {task.key(): task for task in given.values() if isinstance(task, Task)}
    grades, found.facts[metric] = _graded(settings, metric, tasks)
    made_of = {
        place: grades[task.key()] if isinstance(task, Task) else task
        for place, task in given.items()
        if task is not None
    }
    _refuse_failures(settings, metric, list(made_of.values()))
    failed = {query_id for (_, query_id), made in made_of.items() if made.error}
    for (arm, query_id), made in made_of.items():
        if query_id not in failed:
            found.values[arm][query_id].update(made.values)
        found.columns[arm][query_id].update(_columns(metric, made, is_failed=query_id in failed))


def _columns(metric: str, grade: Grade, *, is_failed: bool) -> Column:
    """The status of a grade (failed, left out because it failed in another arm, or graded) and its reason."""
    status = "failed" if grade.error else "left_out" if is_failed else "graded"
    return {f"{metric}_status": status, f"{metric}_reason": grade.error or grade.reason}


def _graded(
    settings: config.Config, metric: config.GradedMetric, tasks: Mapping[str, Task]
) -> tuple[dict[str, Grade], dict[str, int]]:
    """The grade of every task, and how many were made; the new ones are kept as soon as their unit is finished."""
    cache = Grades(settings.workspace, graders.identity(settings, metric))
    grades = {key: grade for key, grade in cache.read().items() if key in tasks} if tasks else {}
    # The order is drawn by the seed, so that no arm's answers come first.
    pending = sorted(tasks.keys() - grades.keys(), key=lambda key: checksums.digest([settings.seed, key]))
    new: list[Grade] = []
    # What is pending beside known grades may be no more than what failed before, and was allowed to.
    allowed = settings.evaluate.max_failed_grades * len(tasks) if grades else 0
    with progress.stage(f"grade ({metric})", len(tasks), "answers", len(grades)) as shown:
        for made in _in_units(settings, metric, [tasks[key] for key in pending]):
            cache.write(made)
            grades |= made
            new += made.values()
            shown.advance(len(made))
            if len(new) >= max(FIRST_FAILURES, allowed + 1) and all(each.error for each in new):
                raise _hopeless(metric, new)
    return grades, {
        "answers": len(tasks),
        "known": len(tasks) - len(new),
        "failed": sum(bool(each.error) for each in new),
        "requests": sum(each.requests for each in new),
        "prompt_tokens": sum(each.prompt_tokens for each in new),
        "completion_tokens": sum(each.completion_tokens for each in new),
    }


def _in_units(
    settings: config.Config, metric: config.GradedMetric, tasks: Sequence[Task]
) -> Iterator[dict[str, Grade]]:
    units = [
        {"unit": number, "tasks": [dataclasses.asdict(task) for task in tasks[start : start + UNIT_TASKS]]}
        for number, start in enumerate(range(0, len(tasks), UNIT_TASKS))
    ]
    if not units:
        return
    arguments = {"settings": settings, "metric": metric}
    if graders.asks_the_judge(settings, metric) and settings.evaluate.judge.engine == "openai":
        # One client, so that no more than evaluate.judge.concurrency requests are in flight.
        pool = actors.Pool(GradeUnit, arguments, 1, {"num_cpus": 0})
    else:
        cluster = settings.cluster
        pool = session.pool(GradeUnit, arguments, cluster.generator_workers, cluster)
    for result in stages.on_actors(pool)(f"grade ({metric})", units):
        yield {key: Grade(**made) for key, made in json.loads(result).items()}


def _refuse_failures(settings: config.Config, metric: str, grades: Sequence[Grade]) -> None:
    failed = [grade.error for grade in grades if grade.error]
    allowed = settings.evaluate.max_failed_grades
    if len(failed) > allowed * len(grades):
        reason, count = Counter(failed).most_common(1)[0]
        raise GradingError(
            f"{len(failed):,} of {len(grades):,} grades of {metric} failed, more than evaluate.max_failed_grades ({allowed:g}) "
            f"allows; most often ({count:,}): {reason}; fix this and run again: only failed grades are asked for again"
        )


def _hopeless(metric: str, grades: Sequence[Grade]) -> GradingError:
    reason, count = Counter(grade.error for grade in grades).most_common(1)[0]
    return GradingError(
        f"all of the first {len(grades):,} new grades of {metric} failed; most often ({count:,}): {reason}; fix this and run "
        "again"
    )
