"""Chooses the grader of a metric, what its grades depend on, and which answers it must read."""

from __future__ import annotations

from typing import Any

from ragtune_ray import config
from ragtune_ray.evaluation.grading.semantic import SemanticGrader
from ragtune_ray.evaluation.grading.task import Grader, Task, fixed_value
from ragtune_ray.models import weights
from ragtune_ray.models.encoder import load_encoder
from ragtune_ray.schema import Answer, Query


def open_grader(settings: config.Config, metric: config.GradedMetric) -> Grader:
    """Load the models of a metric.

    Raises:
        ModelError: a model cannot be found, fetched or loaded.
    """
    match metric:
        case "semantic":
            return SemanticGrader(load_encoder(settings.encoder))


def identity(settings: config.Config, metric: config.GradedMetric) -> dict[str, Any]:
    """What the grades of a metric depend on, beside the task, as JSON values."""
    match metric:
        case "semantic":
            model = weights.resolve(settings.encoder.model)
            return {"metric": metric, "encoder": weights.encoder_fingerprint(model, settings.encoder)}


def identities(settings: config.Config) -> dict[str, Any]:
    """The part of a run's identity for the models of `evaluate.metrics`; empty without such metrics."""
    found = {metric: identity(settings, metric) for metric in settings.evaluate.metrics}
    return {"graders": found} if found else {}


def task_of(metric: config.GradedMetric, query: Query, answer: Answer) -> Task | float | None:
    """What a grader must read to grade an answer; its grade, if nothing; None if the metric is undefined for the query.

    Args:
        metric: the metric.
        query: the question.
        answer: an arm's answer to it.
    """
    if query.answers is None and metric not in config.WITHOUT_GOLD:
        return None
    value = fixed_value(query, answer)
    if value is not None:
        return value
    golds = query.answers or ()
    match metric:
        case "semantic":
            return Task("", golds, answer.answer)
