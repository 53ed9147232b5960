"""`ragtune calibrate`: finds out, on the validation questions, how to retrieve, and when an arm may answer without retrieval.

In: a config whose arm retrieves, and queries with gold answers. Out: `calibrations/ARM/ID/calibration.json` and, if enough
queries have relevant documents, `retrieval.json` and `searches.json`; `CURRENT` next to these directories names the latest. The
bulk answers and hits are kept, so no question is answered or retrieved twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import runs, session, staged_queries
from ragtune_ray.cluster.answering import answer, evaluate
from ragtune_ray.cluster.answering.retrieve import retrieve
from ragtune_ray.cluster.comparing import latency
from ragtune_ray.evaluation import adaptive, intervals
from ragtune_ray.evaluation.comparison import Adaptive, Latency
from ragtune_ray.evaluation.grading import graders
from ragtune_ray.evaluation.retrieval_fit import MIN_QUESTIONS, Measure, RetrievalFit, fit_retrieval, summary_lines
from ragtune_ray.evaluation.search_fit import SearchFit, fit_searches, search_lines
from ragtune_ray.ingest.splits import positives
from ragtune_ray.models import arms
from ragtune_ray.models.scripts import unknown_scripts
from ragtune_ray.storage import artifacts, checksums
from ragtune_ray.storage.results import Result


class CalibrationResult(Result):
    """A finished calibration: a directory with `calibration.json`."""

    @property
    def calibration(self) -> adaptive.RetrievalCalibration:
        """The threshold, and the measurements that led to it."""
        return adaptive.load_calibration(self.path)


def calibrate(settings: config.Config) -> CalibrationResult:
    """Find the confidence from which `answer.arm` answers as well without passages, by `compare.metric` and `compare.margin`.

    First, other settings of retrieval are tried, and the better ones are printed; the calibration itself keeps the config's.

    Raises:
        config.ConfigError: the arm does not retrieve, or its generator reports no confidence.
        evaluation.EvaluationError: no validation question has this metric, or a model was trained on other splits.
    """
    if not config.retrieves(settings.answer.arm):
        raise config.ConfigError(f"answer.arm={settings.answer.arm} never retrieves; name one that does, such as rag")
    settings = settings.with_compared_metric()
    validation = settings.with_values({"queries.split": "validation"})
    if arms.with_tuned_models(validation).generator.engine == "openai":
        raise config.ConfigError(
            f"answer.arm={settings.answer.arm}: engine openai reports no confidence in its answers; use transformers or vllm"
        )
    if config.is_tuned(settings.answer.arm):
        evaluate.check_tuned(validation, settings.answer.arm)
    evaluate.check_used_models(validation, [settings.answer.arm])
    metric = settings.compare.metric
    with session.ray_session(settings.cluster):
        fit, searches = _fit(validation), _fit_searches(validation)
        queries = staged_queries.judged_queries(validation)
        closed = str(answer.answer(validation.with_values({"answer.closed_book": True})))
        opened = str(answer.answer(validation.with_values({"answer.closed_book": False})))
    rows, scores, against = _paired(queries, closed, opened, validation)
    if not rows:
        raise evaluate.EvaluationError(
            f"{settings.queries.path}: no validation question has {metric}; add validation questions with `answers`, or set "
            "another compare.metric"
        )
    found = adaptive.calibrate(
        [adaptive.confidence_of(row) for row in rows],
        scores,
        against,
        margin=settings.compare.margin,
        confidence=settings.evaluate.confidence,
    )
    found = dataclasses.replace(found, model=rows[0].model)
    identity = {
        "runs": [artifacts.read_manifest(run)["manifest_sha256"] for run in (closed, opened)],
        **({"retrieval": dataclasses.asdict(fit)} if fit else {}),
        **({"searches": dataclasses.asdict(searches)} if searches else {}),
        **_rule(settings),
    }
    name = checksums.digest(identity)
    url = adaptive.publish_calibration(settings, name, found, fit, searches, closed_book=closed, retrieved=opened)
    progress.say(f"calibrate ({settings.answer.arm}): {_summary(found, len(rows))}")
    return CalibrationResult(url)


def _rule(settings: config.Config) -> dict[str, Any]:
    """The part of a calibration's identity for what is measured, and by which models."""
    compare, evaluated = settings.compare, settings.evaluate.identity(exclude={"arms"})
    return {"rule": [compare.metric, compare.margin, evaluated, settings.seed], **graders.identities(settings)}


def _fit(validation: config.Config) -> RetrievalFit | None:
    """Try other settings of retrieval on the arm's own index, without the reranker, and print the result.

    None without enough qrels.
    """
    judged = [row for row in staged_queries.selected_queries(validation) if positives(row)]
    if len(judged) < MIN_QUESTIONS:
        return None
    of_arm = arms.with_tuned_models(validation)
    _, manifest = runs.index_version(of_arm)
    weights = ["retrieval.lexical_weight"]
    if unknown_scripts(manifest.get("scripts", {})):
        weights.append("retrieval.unknown_script_weight")
    fit = fit_retrieval(validation, _measuring(of_arm), weights)
    for line in summary_lines(fit) if fit else []:
        progress.say(f"calibrate (retrieval): {line}")
    return fit


def _fit_searches(validation: config.Config) -> SearchFit | None:
    """Try rewriting and splitting with the arm's own generator and index, without the reranker, and print the result.

    None without enough qrels.
    """
    judged = [row for row in staged_queries.selected_queries(validation) if positives(row)]
    if len(judged) < MIN_QUESTIONS:
        return None
    measure = _measuring(arms.with_tuned_models(validation))
    fit = fit_searches(validation, measure, {row.query_id for row in judged if row.history})
    for line in search_lines(fit) if fit else []:
        progress.say(f"calibrate (searches): {line}")
    return fit


def _measuring(of_arm: config.Config) -> Measure:
    """A function that retrieves with other settings and returns the scores of each question."""

    def measure(values: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        run = retrieve(of_arm.with_values({"retrieval.reranker": "", **values}))
        table = pq.read_table(artifacts.open_artifact(run.path, "retrieve").path / "scores.parquet")
        return {row.pop("query_id"): row for row in table.to_pylist()}

    return measure


def effect(
    settings: config.Config,
    queries: Sequence[schema.Query],
    opened: str,
    timed: Sequence[schema.Query],
    always: Latency,
) -> Adaptive | None:
    """The effect of an arm's calibration on other questions, such as the test split; None if it skips no retrieval.

    Args:
        settings: of the arm; a Ray session must be open.
        queries: selected queries with gold answers.
        opened: the run of `answer` in which they were answered with passages.
        timed: queries for measuring the latency without passages.
        always: the arm's latency with passages.
    """
    calibration = adaptive.read_calibration(settings)
    if calibration is None or calibration.threshold is None:
        return None
    if calibration.model != artifacts.read_manifest(opened)["model"]:
        return None
    without_passages = settings.with_values({"answer.closed_book": True})
    rows, scores, against = _paired(queries, str(answer.answer(without_passages)), opened, settings)
    if not rows:
        return None
    confident = np.array([adaptive.is_confident_enough(row, calibration) for row in rows])
    rule, seed = settings.evaluate, settings.seed
    share = intervals.bootstrap(confident.astype(float), rule.resamples, rule.confidence, seed)
    mixed = np.where(confident, scores, against)
    (closed,) = latency.measure([(arms.with_tuned_models(without_passages), "")], timed)
    # Every question is first answered closed-book; the uncertain ones are then answered with passages.
    saved = share.value * always.total.p50_seconds - closed.total.p50_seconds
    return Adaptive(
        threshold=calibration.threshold,
        share=share,
        difference=intervals.paired_bootstrap(against, mixed, rule.resamples, rule.confidence, seed),
        saved_seconds=round(saved, 4),
    )


def _paired(
    queries: Sequence[schema.Query], closed: str, opened: str, settings: config.Config
) -> tuple[list[schema.Answer], np.ndarray, np.ndarray]:
    """The closed-book answers to the questions scored in both runs, and the scores of both runs, (num_questions,) each."""
    metric = settings.compare.metric
    rows = {row.query_id: row for row in evaluate.read_answers(closed)}
    without, having = evaluate.scores_of_runs(queries, [closed, opened], settings)
    shared = [name for name, values in without.items() if metric in values and metric in having.get(name, {})]
    scores, against = (np.array([found[name][metric] for name in shared]) for found in (without, having))
    return [rows[name] for name in shared], scores, against


def _summary(found: adaptive.RetrievalCalibration, num_questions: int) -> str:
    if found.threshold is None or found.difference is None:
        return f"no threshold found: every question needs retrieval ({num_questions:,} validation questions)"
    return (
        f"from confidence {found.threshold:.3f}, closed-book answers are as good: {found.share:.0%} of "
        f"{num_questions:,} validation questions, difference {found.difference.value:+.3f} "
        f"[{found.difference.low:+.3f}, {found.difference.high:+.3f}]"
    )
