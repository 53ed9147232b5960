"""Ray Data: queries -> hits -> answers, in bulk.

In: a config that names queries, an index and a generator. Out: a run directory with `answers.parquet`. A row that cannot be
retrieved or answered becomes a row with a status, never a dead job; a killed worker or driver costs only the units under
way.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster import runs, session, staged_queries, stages
from ragtune_ray.cluster.answering.workers import GenerateUnit, RetrieveUnit
from ragtune_ray.index import retention
from ragtune_ray.models import arms, weights
from ragtune_ray.storage import artifacts, checksums, filesystem

if TYPE_CHECKING:
    import ray.data

__all__ = ["AnswerError", "answer", "generator_fingerprint"]


class AnswerError(RagtuneError, RuntimeError):
    """A bulk job ended without a usable result; the message says what failed and what the next run will do."""


def answer(settings: config.Config) -> Path | str:
    """Answer every query in the arm of `answer.arm`.

    Args:
        settings: workspace, seed, queries, encoder, retrieval, prompt, generator, answer and cluster are used.

    Returns:
        The run's directory.

    Raises:
        AnswerError: more than `answer.max_failed_share` of the rows failed.
        storage.ArtifactError: an arm that retrieves, and there is no sound index.
        models.ModelError: a tuned arm, and nothing was trained for it.
        inputs.InputError: the queries cannot be read.
        stages.StageError: the stage failed.
    """
    settings = arms.with_tuned_models(settings)
    with staged_queries.staged_queries(settings) as staged:
        return _answer(settings, staged)


def _answer(settings: config.Config, staged: staged_queries.StagedQueries) -> Path | str:
    given = settings.answer
    arm = given.arm
    retrieves = given.shows_passages
    version, opened = runs.index_version(settings) if retrieves else ("", {})
    generator = generator_fingerprint(settings.generator)
    identity = {
        **runs.common(settings, staged, opened),
        "arm": arm,
        "closed_book": given.closed_book,
        **(given.model_dump(include={"reading", "rank_weight"}) if given.reading == "apart" else {}),
        "retrieval": settings.retrieval.model_dump(mode="json") if retrieves else None,
        "gold_passage": given.gold_passage,
        "prompt": settings.prompt.model_dump(mode="json"),
        "generator": settings.generator.model_dump(
            mode="json", include={"engine", "precision", "max_new_tokens", "temperature", "stop", "batch_tokens"}
        ),
        "model": generator,
        "abstention": settings.training.abstention,
        "unit_queries": given.unit_queries,
        "seed": settings.seed,
    }
    url, work = runs.places(settings, f"answer-{arm}-{checksums.digest(identity)}")
    if runs.already(url, f"answer ({arm})"):
        return url
    started = time.monotonic()
    directory = filesystem.join(work, "answers")
    with retention.held(settings.workspace, version), session.ray_session(settings.cluster):
        units = staged_queries.units(staged, settings.answer.unit_queries)
        summaries = stages.run_stage(
            f"answer ({arm})",
            directory,
            units,
            lambda dataset: _answering(dataset, settings, version, staged.url, directory, generator, len(units)),
            counted="queries",
            rows_of=lambda unit: int(unit["stop"] - unit["start"]),
        )
    _refuse_failures(settings, directory, summaries, staged.num_queries)
    facts = {
        **runs.facts(settings, version, staged, started),
        "queries_per_second": runs.rate(staged, summaries),
        "busy_seconds": {
            "retrieval": round(sum(summary["retrieval_seconds"] for summary in summaries), 3),
            "generation": round(sum(summary["ended"] - summary["started"] for summary in summaries), 3),
        },
        "arm": arm,
        "model": generator,
    }
    _publish_answers(url, directory, summaries, staged, facts)
    filesystem.remove(work)
    return url


def generator_fingerprint(settings: config.Generator) -> str:
    """What identifies the generator: its files, or the server and its name for the model."""
    match settings.engine:
        case "transformers":
            return weights.resolve(settings.model).fingerprint
        case "openai":
            return f"{settings.base_url}#{settings.model}"


def _answering(
    dataset: ray.data.Dataset,
    settings: config.Config,
    version: str,
    queries: str,
    directory: str,
    generator: str,
    num_units: int,
) -> ray.data.Dataset:
    """Queries -> (hits with their passages) -> answers, streaming: the generators never wait for all of retrieval."""
    if settings.answer.shows_passages:
        arguments = {"settings": settings, "version": version, "queries": queries, "depth": settings.retrieval.top_k}
        # Generating takes a hundred times as long as retrieving: the one retriever must not cost a generator its core.
        dataset = runs.pool(dataset, RetrieveUnit, 1, arguments, {"num_cpus": 0})
    count = session.workers(settings.cluster.generator_workers, settings.cluster.gpus_per_worker)
    arguments = {
        "settings": settings,
        "version": version,
        "queries": queries,
        "directory": directory,
        "fingerprint": generator,
    }
    options = session.worker_options(settings.cluster)
    return runs.pool(dataset, GenerateUnit, min(num_units, count), arguments, options)


def _refuse_failures(
    settings: config.Config, directory: str, summaries: Sequence[dict[str, Any]], num_queries: int
) -> None:
    """End the job when too many rows failed, and let the next run try those units again."""
    failed = sum(summary["failed"] for summary in summaries)
    if failed <= settings.answer.max_failed_share * num_queries:
        return
    reasons: Counter[str] = Counter()
    for summary in summaries:
        reasons.update(summary["errors"])
        if summary["failed"]:
            stages.forget_unit(directory, summary["unit"])
    reason, count = reasons.most_common(1)[0]
    raise AnswerError(
        f"{failed} of {num_queries} rows failed, more than answer.max_failed_share ({settings.answer.max_failed_share}) "
        f"allows; most often ({count}): {reason}; mend that and run the command again: only failed units are done again"
    )


def _publish_answers(
    url: str,
    directory: str,
    summaries: Sequence[dict[str, Any]],
    staged: staged_queries.StagedQueries,
    facts: dict[str, Any],
) -> None:
    staging = artifacts.stage(url)
    answer_schema = schema.arrow_schema(schema.Answer)
    ids: list[np.ndarray] = []
    statuses: Counter[str] = Counter()
    with pq.ParquetWriter(staging / "answers.parquet", answer_schema, write_page_checksum=True) as writer:
        for table in runs.merged(directory, summaries, "parquet"):
            schema.check(table.schema, schema.Answer)
            writer.write_table(table.cast(answer_schema))
            ids.append(table["query_id"].to_numpy())
            statuses.update(table["status"].to_pylist())
    answered = int(sum(len(part) for part in ids))
    if answered != staged.num_queries:
        raise AnswerError(f"{url}: {answered} answers for {staged.num_queries} queries; run the command again")
    (staging / "rejects.jsonl").write_text(schema.reject_lines(staged.rejects), encoding="utf-8")
    artifacts.publish(staging, url, "answer", num_answers=answered, statuses=dict(sorted(statuses.items())), **facts)
    progress.say(f"answer: {answered:,} answers" + (f", {statuses['failed']:,} failed" if statuses["failed"] else ""))
