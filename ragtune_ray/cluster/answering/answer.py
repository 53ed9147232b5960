"""`ragtune answer`: answers many questions in one arm, in parallel: queries -> hits -> answers.parquet.

All hits are found first and committed with their passages (`finding`); then generators read them, a unit of queries at a time.
A query that cannot be retrieved or answered becomes a row with status `failed` and does not stop the job. If a worker or the
driver is killed, only its unfinished units are repeated.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster import runs, session, staged_queries, stages
from ragtune_ray.cluster.answering import finding, rewrite
from ragtune_ray.cluster.answering.passages import Found, Shown
from ragtune_ray.cluster.answering.workers import NO_GOLD_PASSAGE, GenerateUnit
from ragtune_ray.models import arms
from ragtune_ray.storage import artifacts, filesystem
from ragtune_ray.storage.results import Result


class AnswerError(RagtuneError, RuntimeError):
    """A bulk job ended without a usable result."""


@dataclass(frozen=True)
class Answers(Result):
    """A run of `answer`; `to_arrow()` has one row per query, as `schema.Answer`."""

    table: ClassVar[str | None] = "answers.parquet"


def answer(settings: config.Config, known: str = "") -> Answers:
    """Answer every query in the arm of `answer.arm`.

    Args:
        settings: the whole config.
        known: a finished run of the same settings over the first of these queries; its answers are reused, unless the index
            or the generator has changed.

    Raises:
        AnswerError: more than `answer.max_failed_share` of the rows failed.
        ArtifactError: the arm retrieves, and there is no sound index.
        ModelError: the arm is tuned, and no model was trained for it.
    """
    # Staged before the arm's own index replaces the workspace's, so that all arms are asked the same questions.
    with staged_queries.staged_queries(settings) as staged:
        settings = arms.with_tuned_models(settings)
        version, index_manifest = runs.index_version(settings) if settings.answer.shows_passages else ("", {})
        generator, arm = runs.generator_fingerprint(settings.generator), settings.answer.arm
        searches = rewrite.Searching(None)
        if settings.answer.shows_passages and not settings.answer.gold_passage:
            searches = rewrite.Searching.of(settings, staged)
        identity = _identity(settings, staged, index_manifest, generator, searches)
        run = runs.Run.of(settings, "answer", identity, name=f"answer-{arm}")
        if not run.is_finished(f"answer ({arm})"):
            directory = filesystem.join(run.work, "answers")
            if known:
                _take_over(known, directory, staged, settings.answer.unit_queries, index_manifest, generator)
            with run.session(version):
                searches.write(staged, runs.read_manifest(known).get("rewriting", {}).get("path", "") if known else "")
                found, searched = _find(settings, version, staged, run.work, directory, searches)
                summaries = _generate(settings, version, staged, directory, generator, found)
            _refuse_failures(settings, directory, summaries, staged.num_queries)
            _publish(run, directory, summaries, searched, staged, version, generator, searches)
    return Answers(run.url)


def _identity(
    settings: config.Config,
    staged: staged_queries.StagedQueries,
    index_manifest: dict[str, Any],
    generator: str,
    searches: rewrite.Searching,
) -> dict[str, Any]:
    given = settings.answer
    return {
        **runs.inputs_identity(settings, staged, index_manifest),
        "arm": given.arm,
        "closed_book": given.closed_book,
        **(given.model_dump(include={"reading", "rank_weight"}) if given.reading == "apart" else {}),
        "retrieval": searches.identity(settings, index_manifest, staged) if given.shows_passages else None,
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


def _find(
    settings: config.Config,
    version: str,
    staged: staged_queries.StagedQueries,
    work: str,
    directory: str,
    searches: rewrite.Searching,
) -> tuple[Found | None, list[stages.Summary]]:
    """Find what the generators show for the queries that are not answered yet; None if the arm shows no passages."""
    given = settings.answer
    if not given.shows_passages:
        return None, []
    answered = stages.finished_units(directory)
    units = staged_queries.units(staged, given.unit_queries)
    pending = [unit for unit in units if unit["unit"] not in answered]
    depth = 0 if given.gold_passage else settings.retrieval.top_k
    wanted = finding.Wanted(settings, version, depth, searches.url, shown=Shown(gold=given.gold_passage))
    return finding.find(wanted, staged, work, pending)


def _generate(
    settings: config.Config,
    version: str,
    staged: staged_queries.StagedQueries,
    directory: str,
    generator: str,
    found: Found | None,
) -> list[stages.Summary]:
    cluster = session.for_generators(settings)
    arguments = {"settings": settings, "version": version, "queries": staged.url, "directory": directory}
    arguments |= {"fingerprint": generator, "found": found}
    pool = session.pool(GenerateUnit, arguments, cluster.generator_workers, cluster)
    units = staged_queries.units(staged, settings.answer.unit_queries)
    name = f"answer ({settings.answer.arm})"
    work = stages.on_actors(pool)
    return stages.run_stage(name, directory, units, work, counted="queries", rows_of=runs.num_queries)


def _take_over(
    known: str,
    directory: str,
    staged: staged_queries.StagedQueries,
    unit_queries: int,
    index_manifest: dict[str, Any],
    generator: str,
) -> None:
    """Commit the units that another run has answered, with its times, as if they had just been finished."""
    manifest = runs.read_manifest(known)
    if manifest["index_content"] != index_manifest.get("content_id", "") or manifest["model"] != generator:
        return
    table = pq.read_table(artifacts.open_artifact(known, "answer").path / "answers.parquet")
    count, busy, now = table.num_rows, manifest["busy_seconds"], time.time()
    if table["query_id"].to_pylist() != [row.query_id for row in staged_queries.read_queries(staged.url, 0, count)]:
        raise AnswerError(f"{known}: did not answer the first of these queries, so its answers cannot be reused")
    finished = stages.finished_units(directory)
    for unit in staged_queries.units(staged, unit_queries):
        if unit["stop"] > count or unit["unit"] in finished:
            continue
        rows = table.slice(unit["start"], unit["stop"] - unit["start"])
        with tempfile.TemporaryDirectory(prefix="ragtune-answer-") as temporary:
            path = Path(temporary) / "answers.parquet"
            pq.write_table(rows, path, write_page_checksum=True)
            stages.commit_unit(
                directory,
                unit["unit"],
                {"parquet": path},
                failed=rows["status"].to_pylist().count("failed"),
                errors=[text for text in rows["error"].to_pylist() if text][:3],
                retrieval_seconds=busy["retrieval"] * rows.num_rows / count,
                busy_seconds=busy["generation"] * rows.num_rows / count,
                started=now - count / manifest["queries_per_second"],
                ended=now,
            )


def _refuse_failures(
    settings: config.Config, directory: str, summaries: Sequence[stages.Summary], num_queries: int
) -> None:
    """Raise AnswerError if too many rows failed; the next run then repeats their units."""
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
        f"allows; most often ({count}): {reason}; fix this and rerun: only failed units are repeated"
    )


def _retrieval_seconds(searched: Sequence[stages.Summary], summaries: Sequence[stages.Summary]) -> float:
    """Time in which workers retrieved, for this run or for the one whose answers were taken over."""
    taken_over = sum(summary.get("retrieval_seconds", 0.0) for summary in summaries)
    return float(taken_over + sum(summary["ended"] - summary["started"] for summary in searched))


def _busy_seconds(summary: stages.Summary) -> float:
    """Time in which a worker generated the unit's answers; recorded separately if they come from another run."""
    return float(summary.get("busy_seconds", summary["ended"] - summary["started"]))


def _publish(
    run: runs.Run,
    directory: str,
    summaries: Sequence[stages.Summary],
    searched: Sequence[stages.Summary],
    staged: staged_queries.StagedQueries,
    version: str,
    generator: str,
    searches: rewrite.Searching,
) -> None:
    staging = artifacts.stage(run.url)
    answer_schema = schema.arrow_schema(schema.Answer)
    num_answers = num_cut = without_gold = 0
    statuses: Counter[str] = Counter()
    with pq.ParquetWriter(staging / "answers.parquet", answer_schema, write_page_checksum=True) as writer:
        for part in runs.merged(directory, summaries, "parquet"):
            table = schema.conformed(part, schema.Answer)
            writer.write_table(table)
            num_cut += table["cut"].to_pylist().count(True)
            num_answers += table.num_rows
            statuses.update(table["status"].to_pylist())
            without_gold += sum(error.endswith(NO_GOLD_PASSAGE) for error in table["error"].to_pylist())
    if num_answers != staged.num_queries:
        raise AnswerError(f"{run.url}: {num_answers} answers for {staged.num_queries} queries; run the command again")
    (staging / "rejects.jsonl").write_text(schema.reject_lines(staged.rejects), encoding="utf-8")
    facts: runs.RunFacts = {
        **runs.index_facts(run.settings, version, staged),
        "num_answers": num_answers,
        "statuses": dict(sorted(statuses.items())),
        "num_cut": num_cut,
        "queries_per_second": runs.rate(staged, searched, summaries),
        "busy_seconds": {
            "retrieval": round(_retrieval_seconds(searched, summaries), 3),
            "generation": round(sum(map(_busy_seconds, summaries)), 3),
        },
        "arm": run.settings.answer.arm,
        "model": generator,
        **searches.facts(),
    }
    run.publish(staging, facts)
    progress.say(_counted(num_answers - without_gold, without_gold, statuses["failed"] - without_gold))
    if notice := runs.cut_notice(facts, run.settings.generator.max_new_tokens):
        progress.say(f"answer: {notice}")


def _counted(num_asked: int, without_gold: int, num_failed: int) -> str:
    """How many queries were answered; those without a gold passage, which was to be shown, did not fail.

    >>> _counted(35, 5, 0)
    'answer: 35 answers; 5 questions have no gold passage and are left out'
    """
    failed = f", {num_failed:,} failed" if num_failed else ""
    missing = f"; {without_gold:,} questions have no gold passage and are left out" if without_gold else ""
    return f"answer: {num_asked:,} answers{failed}{missing}"
