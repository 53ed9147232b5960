"""Says what a reader must know before trusting a verdict that rests on grades; of labels, `labelling.checking` says it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ragtune_ray import config
from ragtune_ray.evaluation.grading.graders import asks_the_judge
from ragtune_ray.evaluation.scoring import PerQuery

LONGER_IS_BETTER = 0.3
"""Partial correlation of grade and length from which on the judge may prefer longer answers."""
MIN_ANSWERS = 50
"""With fewer answers, a correlation of 0.3 may be chance."""


def warnings(
    settings: config.Config,
    generators: Mapping[config.Arm, str],
    scores: Mapping[config.Arm, PerQuery],
    lengths: Mapping[config.Arm, Mapping[str, int]],
) -> list[str]:
    """Sentences about `compare.metric`, if a model computes it; without a model, none.

    Args:
        settings: of the comparison.
        generators: arm -> name of its generator; of a tuned one, that of the model it was tuned from.
        scores: arm -> its scores.
        lengths: arm -> query id -> number of characters of its answer.
    """
    metric = settings.compare.metric
    lines = []
    left_out = _left_out(metric, scores)
    if left_out and metric in settings.evaluate.metrics:
        lines.append(
            f"{left_out:,} questions are left out, because the grade of an answer failed; scores.parquet of the evaluation names "
            f"them ({metric}_status)."
        )
    if metric == "groundedness" and (silent := [arm for arm in scores if not config.retrieves(arm)]):
        lines.append(
            f"groundedness asks whether passages support an answer; {' and '.join(silent)} show none, so their score is 0 by "
            "definition."
        )
    if metric == "semantic":
        lines.append(
            "semantic compares what answers are about: an answer with a negation or another number scores nearly as high as the "
            "right one."
        )
    if metric in ("groundedness", "judge") and asks_the_judge(settings, metric):
        lines += _of_the_judge(settings, generators)
    if metric == "judge" and (correlation := length_preference(metric, scores, lengths)) >= LONGER_IS_BETTER:
        lines.append(
            "The judge may prefer longer answers: among answers that contain a gold answer alike, longer ones have higher "
            f"grades (partial correlation {correlation:+.2f})."
        )
    return lines


def _of_the_judge(settings: config.Config, generators: Mapping[config.Arm, str]) -> list[str]:
    judge = settings.evaluate.judge.model
    lines = []
    if settings.compare.metric == "groundedness":
        lines.append(
            f"Whether passages support a sentence was decided by {judge}, which nobody has checked; a cross-encoder for natural "
            "language inference (evaluate.nli_model) has published error rates."
        )
    if own := [arm for arm, model in generators.items() if model == judge]:
        lines.append(
            f"{judge} judges its own answers, those of {' and '.join(own)}; models tend to prefer their own (Panickssery et al. "
            "2024): name another model as evaluate.judge.model."
        )
    return lines


def _left_out(metric: str, scores: Mapping[config.Arm, PerQuery]) -> int:
    """Questions without the metric: it is defined for every question that it can score, unless a grade failed."""
    without_gold = metric in config.WITHOUT_GOLD
    return len(
        {
            name
            for each in scores.values()
            for name, row in each.items()
            if metric not in row and (without_gold or "EM" in row)
        }
    )


def length_preference(
    metric: str, scores: Mapping[config.Arm, PerQuery], lengths: Mapping[config.Arm, Mapping[str, int]]
) -> float:
    """Partial correlation of a metric with the length of answers, given whether they contain a gold answer.

    A longer answer contains a gold answer more often, so what is left is a liking for length beyond what the gold answers
    explain; or wordings that they do not have. 0 with fewer than `MIN_ANSWERS` answers, or if nothing varies.

    >>> rows = {str(n): {"judge": n % 2 * 1.0, "contains_answer": 1.0} for n in range(60)}
    >>> round(length_preference("judge", {"rag": rows}, {"rag": {name: 10 + int(name) % 2 * 90 for name in rows}}), 2)
    1.0
    """
    rows = [
        (row[metric], float(np.log1p(lengths[arm][name])), row["contains_answer"])
        for arm, each in scores.items()
        for name, row in each.items()
        if metric in row and "contains_answer" in row and not row.get("abstained") and not row.get("failed")
    ]
    if len(rows) < MIN_ANSWERS:
        return 0.0
    grades, long, contained = (np.array(column) for column in zip(*rows, strict=True))
    left, right = _without(grades, contained), _without(long, contained)
    spread = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum()) / spread if spread > 1e-9 else 0.0


def _without(values: np.ndarray, explained_by: np.ndarray) -> np.ndarray:
    """The residuals of a linear regression."""
    columns = np.column_stack([np.ones(len(values)), explained_by])
    found: np.ndarray = values - columns @ np.linalg.lstsq(columns, values, rcond=None)[0]
    return found
