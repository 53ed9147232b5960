"""Checks a metric against people's labels: how often they agree, and whether the labels suffice to correct it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ragtune_ray import config
from ragtune_ray.evaluation import intervals, prediction_powered
from ragtune_ray.evaluation.comparison import Checked, CheckedArm
from ragtune_ray.evaluation.labelling import agreement, labels
from ragtune_ray.evaluation.labelling.labels import Key, Labels
from ragtune_ray.evaluation.scoring import PerQuery
from ragtune_ray.evaluation.verdict import MIN_QUESTIONS

JUDGE = "judge"
"""The only metric that labels correct: a model that says how right an answer is, as people do."""
Grades = Mapping[str, Mapping[str, float]]
"""Arm -> query id -> grade."""
MAX_PARTLY = 1
"""Questions that may be labelled in part, as the one at which a person stopped. Where arms were added or trained again, many
are: those with a label for every new answer then are those whose answers did not change, and no random sample."""


def check(
    scores: Mapping[str, PerQuery], answers: Mapping[str, Mapping[str, Key]], given: Labels, settings: config.Config
) -> tuple[Checked | None, dict[str, dict[str, float]] | None]:
    """Compare a metric with people's grades of the same answers.

    Args:
        scores: arm -> query id -> metric -> value.
        answers: arm -> query id -> its answer.
        given: the labels.
        settings: the metric that decides, and the confidence of intervals.

    Returns:
        What the report shows, None without any label; and the labels that correct `compare.metric`, None if none do: another
        metric decides, fewer than `MIN_QUESTIONS` questions are labelled in full, more than `MAX_PARTLY` in part, or asking
        stops with the verdict, as the correction has no interval that holds at every look.
    """
    if not given.rows and not given.rejects:
        return None, None
    metric = (
        JUDGE if any(JUDGE in row for each in scores.values() for row in each.values()) else settings.compare.metric
    )
    graded = {
        arm: {query_id: row[metric] for query_id, row in each.items() if metric in row} for arm, each in scores.items()
    }
    given = given.with_questions({query_id: key[1] for keys in answers.values() for query_id, key in keys.items()})
    labelled, touched = labels.of_arms(answers, given), _touched(answers, given)
    full, is_judged = labels.shared(labelled), settings.compare.metric == JUDGE
    usable = {arm: _graded_too({name: each[name] for name in full}, graded[arm]) for arm, each in labelled.items()}
    partly = len(touched) - len(full)
    needed = max(0, MIN_QUESTIONS - len(labels.shared(usable)), partly if partly > MAX_PARTLY else 0)
    corrects = is_judged and settings.compare.until == "all" and not needed
    found = Checked(
        metric=metric,
        path=given.path,
        answers=len({answers[arm][query_id] for arm, each in labelled.items() for query_id in each}),
        questions=len(full),
        partly=partly,
        needed=needed if is_judged else 0,
        corrected=corrects,
        overall=_overall(labelled, graded, answers),
        arms={
            arm: CheckedArm(
                agreement=_agreement(each, graded[arm]),
                alone=intervals.mean_of(scores[arm], metric, settings),
                people=_people(each, touched, settings),
            )
            for arm, each in labelled.items()
        },
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
            f"(ragtune label CONFIG{_as_before(checked)}"
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


def _as_before(checked: Checked) -> str:
    if checked.partly <= MAX_PARTLY:
        return ")."
    return (
        f", with --questions as before). Some arm's answers to {checked.partly:,} labelled questions have no label; without "
        "them the labelled questions are no random sample."
    )


def _questions(number: int) -> str:
    return f"{number:,} question{'' if number == 1 else 's'}"


def _touched(answers: Mapping[str, Mapping[str, Key]], given: Labels) -> set[str]:
    """The questions with a label of any answer, among those that every arm answered."""
    questions = {(row.query_id, row.query) for row in given.rows}
    return set.intersection(
        *({name for name, key in each.items() if key[:2] in questions} for each in answers.values())
    )


def _graded_too(labelled: Mapping[str, float], graded: Mapping[str, float]) -> dict[str, float]:
    return {query_id: grade for query_id, grade in labelled.items() if query_id in graded}


def _overall(labelled: Grades, graded: Grades, answers: Mapping[str, Mapping[str, Key]]) -> agreement.Agreement:
    """Over the labelled answers of all arms; an answer that two arms gave counts once if both have the same grade."""
    pairs = {
        (answers[arm][query_id], graded[arm][query_id]): grade
        for arm, each in labelled.items()
        for query_id, grade in _graded_too(each, graded[arm]).items()
    }
    return agreement.agreement(list(pairs.values()), [grade for _, grade in pairs])


def _agreement(labelled: Mapping[str, float], graded: Mapping[str, float]) -> agreement.Agreement:
    both = _graded_too(labelled, graded)
    return agreement.agreement(list(both.values()), [graded[query_id] for query_id in both])


def _people(
    labelled: Mapping[str, float], touched: Collection[str], settings: config.Config
) -> intervals.Interval | None:
    """The mean of people's grades; None with fewer than the two labels that an interval needs, or if too many lack."""
    if len(labelled) < 2 or len(touched) - len(labelled) > MAX_PARTLY:
        return None
    return _interval(prediction_powered.labels_alone(labelled), settings)


def _interval(found: prediction_powered.Estimate, settings: config.Config) -> intervals.Interval:
    value, low, high = (min(1.0, max(0.0, end)) for end in (found.value, *found.ends(settings.evaluate.confidence)))
    return intervals.Interval(value, low, high, found.n)
