"""Checks a metric against people's labels: how often they agree, and whether the labels suffice to correct it."""

from __future__ import annotations

from collections.abc import Mapping

from ragtune_ray import config
from ragtune_ray.evaluation import intervals, prediction_powered
from ragtune_ray.evaluation.comparison import Checked, CheckedArm
from ragtune_ray.evaluation.labelling import agreement, labels
from ragtune_ray.evaluation.labelling.labels import Labels
from ragtune_ray.evaluation.scoring import PerQuery
from ragtune_ray.evaluation.verdict import MIN_QUESTIONS

JUDGE = "judge"
"""The only metric that labels correct: a model that says how right an answer is, as people do."""
Grades = Mapping[str, Mapping[str, float]]
"""Arm -> query id -> grade."""


def check(
    scores: Mapping[str, PerQuery], answers: Mapping[str, Mapping[str, str]], given: Labels, settings: config.Config
) -> tuple[Checked | None, dict[str, dict[str, float]] | None]:
    """Compare a metric with people's grades of the same answers.

    Args:
        scores: arm -> query id -> metric -> value.
        answers: arm -> query id -> text of its answer.
        given: the labels.
        settings: the metric that decides, and the confidence of intervals.

    Returns:
        What the report shows, None without any label; and the labels that correct `compare.metric`, None if none do: another
        metric decides, fewer than `MIN_QUESTIONS` questions are labelled in full, or asking stops with the verdict, as the
        correction has no interval that holds at every look.
    """
    if not given.rows and not given.rejects:
        return None, None
    metric = (
        JUDGE if any(JUDGE in row for each in scores.values() for row in each.values()) else settings.compare.metric
    )
    graded = {
        arm: {query_id: row[metric] for query_id, row in each.items() if metric in row} for arm, each in scores.items()
    }
    labelled = labels.of_arms(answers, given)
    usable = {
        arm: {name: grade for name, grade in each.items() if name in graded[arm]} for arm, each in labelled.items()
    }
    enough = len(labels.shared(usable))
    corrects = (
        settings.compare.metric == JUDGE
        and settings.compare.until == "all"
        and enough >= MIN_QUESTIONS
        and len(scores) > 0
    )
    found = Checked(
        metric=metric,
        path=given.path,
        answers=len({(query_id, answers[arm][query_id]) for arm, each in labelled.items() for query_id in each}),
        questions=len(labels.shared(labelled)),
        needed=max(0, MIN_QUESTIONS - enough) if settings.compare.metric == JUDGE else 0,
        corrected=corrects,
        overall=_overall(usable, graded, answers),
        arms={arm: _arm(each, metric, labelled[arm], usable[arm], settings) for arm, each in scores.items()},
        between=agreement.between_labellers(given),
        others=labels.num_others(answers, given),
        rejects=given.rejects,
    )
    return found, usable if corrects else None


def corrected_mean(scores: PerQuery, labelled: Mapping[str, float], settings: config.Config) -> intervals.Interval:
    """The mean of `compare.metric` of an arm, corrected by its labels, within 0 and 1."""
    metric = settings.compare.metric
    graded = {query_id: row[metric] for query_id, row in scores.items() if metric in row}
    return _interval(prediction_powered.estimate(graded, labelled), settings)


def agreements(checked: Checked) -> list[str]:
    """How often people agree with the metric and with each other, a sentence each."""
    name = checked.metric.replace("_", " ")
    lines = [
        f"People and {name}: {checked.overall.sentence()}. All answers to {_questions(checked.questions)} are labelled."
    ]
    if checked.between:
        lines.append(f"People with each other: {checked.between.sentence()}.")
    return lines


def reasons(checked: Checked) -> list[str]:
    """What the labels do to the verdict, a sentence each."""
    corrected = "Means and differences are corrected by these labels (prediction-powered inference)."
    return [*agreements(checked), *([corrected] if checked.corrected else [])]


def warnings(checked: Checked | None, settings: config.Config) -> list[str]:
    """What the reader must know of a judge that nobody checked, and of labels that do not count, a sentence each."""
    is_judged, lines = settings.compare.metric == JUDGE, list[str]()
    if checked is None:
        unchecked = "The verdict rests on a judge that nobody has checked: label some answers (ragtune label CONFIG)."
        return [unchecked] if is_judged else []
    if checked.needed:
        lines.append(
            f"The verdict rests on a judge that is not corrected: label {_questions(checked.needed)} more "
            "(ragtune label CONFIG)."
        )
    elif is_judged and not checked.corrected:
        lines.append(
            "The labels do not correct the judge, as compare.until=decided: only with compare.until=all do intervals hold."
        )
    return [*lines, *not_counted(checked)]


def not_counted(checked: Checked) -> list[str]:
    """Labels of other runs, and lines that are no labels, a sentence each."""
    lines = []
    if checked.others:
        lines.append(f"{checked.others:,} labelled answers are not of this run, and do not count here.")
    if checked.rejects:
        lines.append(f"{checked.path}: {len(checked.rejects):,} lines are no labels; the first: {checked.rejects[0]}.")
    return lines


def _questions(number: int) -> str:
    return f"{number:,} question{'' if number == 1 else 's'}"


def _overall(usable: Grades, graded: Grades, answers: Mapping[str, Mapping[str, str]]) -> agreement.Agreement:
    """Over the labelled answers of all arms; an answer that two arms gave counts once if both have the same grade."""
    pairs = {
        (query_id, answers[arm][query_id], graded[arm][query_id]): grade
        for arm, each in usable.items()
        for query_id, grade in each.items()
    }
    return agreement.agreement(list(pairs.values()), [key[2] for key in pairs])


def _arm(
    scores: PerQuery, metric: str, labelled: Mapping[str, float], usable: Mapping[str, float], settings: config.Config
) -> CheckedArm:
    return CheckedArm(
        agreement=agreement.agreement(list(usable.values()), [scores[query_id][metric] for query_id in usable]),
        alone=intervals.mean_of(scores, metric, settings),
        people=_interval(prediction_powered.labels_alone(labelled), settings) if len(labelled) > 1 else None,
    )


def _interval(found: prediction_powered.Estimate, settings: config.Config) -> intervals.Interval:
    value, low, high = (min(1.0, max(0.0, end)) for end in (found.value, *found.ends(settings.evaluate.confidence)))
    return intervals.Interval(value, low, high, found.n)
