"""Chooses the grader of a metric, what its grades depend on, and which answers it must read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ragtune_ray import config
from ragtune_ray.evaluation.grading import groundedness, judge
from ragtune_ray.evaluation.grading.asking import open_asker
from ragtune_ray.evaluation.grading.semantic import SemanticGrader
from ragtune_ray.evaluation.grading.sentences import checked_sentences
from ragtune_ray.evaluation.grading.task import Grade, Grader, GradingError, Task, fixed_value
from ragtune_ray.models import weights
from ragtune_ray.models.encoder import load_encoder
from ragtune_ray.models.entailment import EntailmentModel, entailment_label
from ragtune_ray.schema import Answer, Query


def open_grader(settings: config.Config, metric: config.GradedMetric) -> Grader:
    """Load the models of a metric.

    Raises:
        ModelError: a model cannot be found, fetched or loaded.
        GradingError: the judge's API key is missing, or the engine cannot run it.
    """
    match metric:
        case "semantic":
            return SemanticGrader(load_encoder(settings.encoder))
        case "groundedness" if settings.evaluate.nli_model:
            return groundedness.NliGrader(EntailmentModel(settings.evaluate.nli_model))
        case "groundedness":
            return groundedness.JudgedGroundedness(open_asker(settings))
        case "judge":
            return judge.JudgeGrader(open_asker(settings))


def asks_the_judge(settings: config.Config, metric: config.GradedMetric) -> bool:
    """Whether a metric sends requests to the model of `evaluate.judge`."""
    return metric == "judge" or (metric == "groundedness" and not settings.evaluate.nli_model)


def require_models(settings: config.Config) -> None:
    """Refuse a metric of `evaluate.metrics` whose model is not named or cannot be used; loads none, and asks no server.

    Raises:
        GradingError: no model is named, or the API key of its server is missing.
        ModelError: a model cannot be found or fetched, or the NLI model has no label for entailment.
    """
    if "groundedness" in settings.evaluate.metrics and settings.evaluate.nli_model:
        entailment_label(weights.weights_of(weights.resolve(settings.evaluate.nli_model)))
    asking = [metric for metric in settings.evaluate.metrics if asks_the_judge(settings, metric)]
    if asking and settings.evaluate.judge.model:
        if settings.evaluate.judge.engine == "openai":
            open_asker(settings)
        else:
            weights.resolve(settings.evaluate.judge.model)
    for metric in asking:
        if not settings.evaluate.judge.model:
            other = " or evaluate.nli_model (a cross-encoder for natural language inference)"
            raise GradingError(
                f"{metric}: no model is named that grades answers; set evaluate.judge.model (with evaluate.judge.base_url, the "
                f"address of its server, or evaluate.judge.engine=transformers){other if metric == 'groundedness' else ''}"
            )


def identity(settings: config.Config, metric: config.GradedMetric) -> dict[str, Any]:
    """What the grades of a metric depend on, beside the task, as JSON values."""
    match metric:
        case "semantic":
            model = weights.resolve(settings.encoder.model)
            return {"metric": metric, "encoder": weights.encoder_fingerprint(model, settings.encoder)}
        case "groundedness" if settings.evaluate.nli_model:
            return {"metric": metric, "nli_model": weights.resolve(settings.evaluate.nli_model).fingerprint}
        case "groundedness":
            return {"metric": metric, "rubric": groundedness.RUBRIC, "judge": _judge_identity(settings)}
        case "judge":
            return {"metric": metric, "rubric": judge.RUBRIC, "judge": _judge_identity(settings)}


def _judge_identity(settings: config.Config) -> dict[str, Any]:
    rule = settings.evaluate.judge
    served = rule.engine == "openai"
    model = f"{rule.base_url}#{rule.model}" if served else weights.resolve(rule.model).fingerprint
    return {"engine": rule.engine, "model": model, "max_new_tokens": rule.max_new_tokens, "temperature": 0}


def identities(settings: config.Config) -> dict[str, Any]:
    """The part of a run's identity for the models of `evaluate.metrics`; empty without such metrics."""
    found = {metric: identity(settings, metric) for metric in settings.evaluate.metrics}
    return {"graders": found} if found else {}


def task_of(
    metric: config.GradedMetric, query: Query, answer: Answer, texts: Mapping[str, str], evidence: tuple[str, ...]
) -> Task | Grade | None:
    """What a grader must read to grade an answer; its grade, if nothing; None if the metric is undefined for the query.

    Args:
        metric: the metric.
        query: the question.
        answer: an arm's answer to it.
        texts: passage id -> text, of the passages in the prompt; empty if the metric needs none.
        evidence: texts of passages for the question; they count if the arm was shown none.
    """
    if query.answers is None and metric not in config.WITHOUT_GOLD:
        return None
    shown = {name: texts[name] for name in answer.passage_ids if name in texts}
    value = fixed_value(query, answer)
    if metric == "groundedness":
        # An arm without passages names no source, so a reader cannot check its answer.
        fixed = 0.0 if value is None and not shown else value
        return _groundedness_task(query, answer, shown) if fixed is None else _fixed_groundedness(query, fixed)
    if value is not None:
        # Without gold answers the judge also says whether an answer is relevant; these are not.
        return Grade({metric: value} | ({"relevance": value} if metric == "judge" and query.answers is None else {}))
    if metric == "semantic":
        return Task("", query.answers or (), answer.answer)
    if query.answers:
        return Task(_asked(query), query.answers, answer.answer)
    if passages := tuple(shown.values()) or evidence:
        return Task(_asked(query), (), answer.answer, passages)
    return Grade(
        error="the question has no gold answers, and no passage was retrieved to check the answer against; add gold answers, "
        "or an arm that retrieves"
    )


def _fixed_groundedness(query: Query, value: float) -> Grade:
    return Grade({"groundedness": value} | ({} if query.answers == () else {"citation_support_recall": 0.0}))


def _groundedness_task(query: Query, answer: Answer, shown: Mapping[str, str]) -> Task:
    by_answer = tuple(dict.fromkeys(citation.passage_id for citation in answer.citations))
    found = checked_sentences(answer.answer, answer.sentence_citations, by_answer)
    places = {name: place for place, name in enumerate(shown)}
    return Task(
        _asked(query),
        (),
        answer.answer,
        tuple(shown.values()),
        tuple(text for text, _ in found),
        tuple(tuple(places[name] for name in names if name in places) for _, names in found),
    )


def _asked(query: Query) -> str:
    """The question, after the turns of the conversation before it."""
    return "\n".join([*(f"{role}: {content}" for role, content in query.history), query.text])
