"""Calibrate when an arm may answer without retrieval, on the validation questions, and what that brings.

In: a config whose arm retrieves, and queries with gold answers. Out: `calibrations/ARM/ID/calibration.json`, and `CURRENT` beside
it, which names the last one. Both answers to each question are given in bulk, and kept: nothing is answered twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import session, staged_queries
from ragtune_ray.cluster.answering import answer, evaluate
from ragtune_ray.evaluation import adaptive, intervals
from ragtune_ray.models import arms
from ragtune_ray.storage import artifacts, checksums

__all__ = ["calibrate", "effect"]


def calibrate(settings: config.Config) -> str:
    """Find from which confidence on the arm of `answer.arm` answers as well without passages, by `compare.metric`.

    Args:
        settings: as for `answer`; of `compare`, metric and margin, and the intervals' settings of `evaluate` are used.

    Returns:
        The calibration's directory.

    Raises:
        config.ConfigError: the arm does not retrieve, or its generator does not say how sure it is.
        evaluation.EvaluationError: no validation question has that metric.
    """
    if not config.retrieves(settings.answer.arm):
        raise config.ConfigError(f"answer.arm={settings.answer.arm} never retrieves; name one that does, such as rag")
    validation = settings.with_values({"queries.split": "validation"})
    if arms.with_tuned_models(validation).generator.engine != "transformers":
        raise config.ConfigError(
            f"generator.engine={settings.generator.engine} does not say how sure it is of an answer; use transformers"
        )
    metric, rule = settings.compare.metric, settings.evaluate
    with session.ray_session(settings.cluster):
        queries = staged_queries.judged_queries(validation)
        closed = str(answer.answer(validation.with_values({"answer.closed_book": True})))
        opened = str(answer.answer(validation.with_values({"answer.closed_book": False})))
    rows, scores, against = _paired(queries, closed, opened, validation)
    if not rows:
        raise evaluate.EvaluationError(
            f"{settings.queries.path}: no validation question has {metric}; give validation questions with `answers`, or "
            "another compare.metric"
        )
    found = adaptive.calibrate(
        [adaptive.confidence_of(row) for row in rows],
        scores,
        against,
        margin=settings.compare.margin,
        confidence=rule.confidence,
        resamples=rule.resamples,
        seed=settings.seed,
    )
    found = dataclasses.replace(found, model=rows[0].model)
    identity = {
        "runs": [artifacts.read_manifest(run)["manifest_sha256"] for run in (closed, opened)],
        "rule": [metric, settings.compare.margin, rule.model_dump(mode="json", exclude={"arms"}), settings.seed],
    }
    name = checksums.digest(identity)
    url = adaptive.publish_calibration(settings, name, found, closed_book=closed, retrieved=opened)
    progress.say(f"calibrate ({settings.answer.arm}): {_told(found, len(rows))}")
    return url


def effect(settings: config.Config, queries: Sequence[schema.Query], opened: str) -> dict[str, Any] | None:
    """What the last calibration of an arm does to other questions, such as the test split's.

    Args:
        settings: of the arm; the Ray session must be open.
        queries: judged ones, of those that the config selects.
        opened: the run of `answer` in which they were answered with passages.

    Returns:
        {"threshold", "share", "difference"}: the share that is answered without retrieval, and the scores with this less those
        with passages for all; None where there is no calibration of this generator, or none that leaves anything out.
    """
    calibration = adaptive.read_calibration(settings)
    if calibration is None or calibration.threshold is None:
        return None
    if calibration.model != artifacts.read_manifest(opened)["model"]:
        return None
    closed = str(answer.answer(settings.with_values({"answer.closed_book": True})))
    rows, scores, against = _paired(queries, closed, opened, settings)
    if not rows:
        return None
    sure = np.array([adaptive.is_sure(row, calibration) for row in rows])
    mixed = np.where(sure, scores, against)
    rule = settings.evaluate
    return {
        "threshold": calibration.threshold,
        "share": intervals.bootstrap(sure.astype(float), rule.resamples, rule.confidence, settings.seed),
        "difference": intervals.paired_bootstrap(against, mixed, rule.resamples, rule.confidence, settings.seed),
    }


def _paired(
    queries: Sequence[schema.Query], closed: str, opened: str, settings: config.Config
) -> tuple[list[schema.Answer], np.ndarray, np.ndarray]:
    """The closed-book answers of the questions that both runs have a score for, and both scores, each (num_questions,)."""
    metric = settings.compare.metric
    rows = {row.query_id: row for row in evaluate.read_answers(closed)}
    ours = evaluate.scores_of(queries, list(rows.values()), settings)
    theirs = evaluate.scores_of(queries, evaluate.read_answers(opened), settings)
    shared = [name for name, values in ours.items() if metric in values and metric in theirs.get(name, {})]
    scores, against = (np.array([found[name][metric] for name in shared]) for found in (ours, theirs))
    return [rows[name] for name in shared], scores, against


def _told(found: adaptive.Calibration, num_questions: int) -> str:
    if found.threshold is None or found.difference is None:
        return f"on {num_questions:,} validation questions no closed-book answers are as good; all are retrieved for"
    return (
        f"from a confidence of {found.threshold:.3f} on closed-book answers are as good: {found.share:.0%} of "
        f"{num_questions:,} validation questions, difference {found.difference.value:+.3f} "
        f"[{found.difference.low:+.3f}, {found.difference.high:+.3f}]"
    )
