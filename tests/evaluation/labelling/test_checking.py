"""Labels in the decision: a judge that favours an arm misleads it, and labels of a random part put it right."""

import dataclasses

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.evaluation import decision, prediction_powered
from ragtune_ray.evaluation.comparison import Checked
from ragtune_ray.evaluation.costs import Cost
from ragtune_ray.evaluation.labelling import checking
from ragtune_ray.evaluation.labelling.agreement import Agreement
from ragtune_ray.evaluation.labelling.labels import Key, Label, Labels
from ragtune_ray.evaluation.verdict import MIN_QUESTIONS, Evidence, Verdict

JUDGED = config.Config().with_values({"compare.metric": "judge"})
N = 600
Keys = dict[str, dict[str, Key]]


def world(seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """People's and the judge's grades of two arms: base is better, but the judge calls every long answer of rag right."""
    generator = np.random.default_rng(seed)
    people = {"base": (generator.random(N) < 0.7) * 1.0, "rag": (generator.random(N) < 0.5) * 1.0}
    judge = {"base": people["base"], "rag": np.where(generator.random(N) < 0.8, 1.0, people["rag"])}
    return people, judge


def scores(judge: dict[str, np.ndarray], metric: str = "judge") -> dict[str, dict[str, dict[str, float]]]:
    return {arm: {f"q{n}": {metric: float(value)} for n, value in enumerate(each)} for arm, each in judge.items()}


def answers() -> Keys:
    return {arm: {f"q{n}": (f"q{n}", "?", f"{arm} says {n}") for n in range(N)} for arm in ("base", "rag")}


def labelled(people: dict[str, np.ndarray], count: int, labeller: str = "ann") -> Labels:
    rows = [
        Label(f"q{n}", "?", answers()[arm][f"q{n}"][2], float(each[n]), labeller, "")
        for arm, each in people.items()
        for n in range(count)
    ]
    return Labels(tuple(rows), path="labels.jsonl")


def decide(given: Labels, judge: dict[str, np.ndarray]) -> tuple[Checked | None, Verdict]:
    checked, correcting = checking.check(scores(judge), answers(), given, JUDGED)
    evidence = {
        arm: Evidence(each, Cost(0, 0, 0, 1, 100, 10.0 + (arm == "rag"), "USD"), 1.0, 1.0, 1.0, labels=(correcting or {}).get(arm))
        for arm, each in scores(judge).items()
    }  # fmt: skip
    found = decision.differences(scores(judge), JUDGED, correcting)
    return checked, decision.decide(evidence, found, JUDGED)


def test_labels_turn_the_verdict_of_a_judge_that_favours_an_arm() -> None:
    people, judge = world()
    _, misled = decide(Labels(), judge)
    assert (misled.outcome, misled.arm) == ("recommended", "rag")
    checked, right = decide(labelled(people, 100), judge)
    assert (right.outcome, right.arm) == ("recommended", "base")
    assert checked is not None
    assert (checked.corrected, checked.answers, checked.questions, checked.needed) == (True, 200, 100, 0)
    assert checked.arms["base"].agreement.alike == 100
    agree = int((people["rag"][:100] == judge["rag"][:100]).sum())
    assert checked.arms["rag"].agreement.alike == agree
    assert checked.overall == dataclasses.replace(checked.overall, n=200, alike=100 + agree)
    (row,) = right.differences
    judged = {f"q{n}": float(judge["rag"][n] - judge["base"][n]) for n in range(N)}
    seen = {f"q{n}": float(people["rag"][n] - people["base"][n]) for n in range(100)}
    expected = prediction_powered.estimate(judged, seen)
    assert (row.arm, row.value, row.labels) == ("rag", pytest.approx(expected.value), 100)
    assert (row.low, row.high) == pytest.approx(expected.ends(0.95))
    base = checking.corrected_mean(
        scores(judge)["base"], {f"q{n}": float(people["base"][n]) for n in range(100)}, JUDGED
    )
    assert f"base scores highest of 2: judge {base.value:.3f}" in right.reason[0]
    assert "rag - base" in right.reason[1]
    mean = checking.corrected_mean(scores(judge)["rag"], {f"q{n}": float(people["rag"][n]) for n in range(100)}, JUDGED)
    assert abs(mean.value - 0.5) < 0.15 < abs(judge["rag"].mean() - 0.5)


def test_intervals_at_another_confidence_stay_corrected() -> None:
    people, judge = world()
    _, correcting = checking.check(scores(judge), answers(), labelled(people, 50), JUDGED)
    (row,) = decision.differences(scores(judge), JUDGED, correcting)
    wide, narrow = row.ends(0.99), row.ends(0.95)
    assert (row.low, row.high) == narrow
    # Student's t: the half widths are as the quantiles.
    ratio = (
        prediction_powered.t_ends(0, 1, row.degrees, 0.99)[1] / prediction_powered.t_ends(0, 1, row.degrees, 0.95)[1]
    )
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(ratio)
    with pytest.raises(ValueError, match="holds at every look"):
        row.ends(0.95, any_time=True)


def test_too_few_labels_do_not_correct_and_say_how_many_more() -> None:
    people, judge = world()
    checked, verdict = decide(labelled(people, MIN_QUESTIONS - 1), judge)
    assert checked is not None
    assert (checked.corrected, checked.needed) == (False, 1)
    assert verdict.arm == "rag"
    (warning,) = checking.warnings(checked, JUDGED)
    assert "label 1 question more" in warning
    enough, _ = decide(labelled(people, MIN_QUESTIONS), judge)
    assert enough is not None
    assert enough.corrected


def test_open_differences_say_how_many_questions_to_label() -> None:
    generator = np.random.default_rng(5)
    people = {arm: (generator.random(N) < share) * 1.0 for arm, share in (("base", 0.5), ("rag", 0.53))}
    _, verdict = decide(labelled(people, 30), people)
    assert verdict.outcome == "too_few_questions"
    (row,) = verdict.differences
    assert row.needed is not None
    needed = f"{row.needed:,} questions with {-(-row.needed * 30 // N):,} of them labelled"
    assert needed in verdict.reason[1]
    assert needed in verdict.warnings[0]


def test_the_arm_that_is_named_is_ahead_by_the_corrected_differences() -> None:
    """Each estimate has its own slope, so the arm with the higher corrected mean may have the lower corrected difference."""
    contrary = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        people = {arm: (generator.random(N) < 0.5) * 1.0 for arm in ("base", "rag")}
        judge = {arm: np.where(generator.random(N) < 0.7, grades, 1 - grades) for arm, grades in people.items()}
        _, verdict = decide(labelled(people, 25), judge)
        (row,) = verdict.differences
        if verdict.outcome == "too_few_questions":
            assert row.value <= 0
            assert f"; {row.against} (" in verdict.headline
            assert verdict.reason[0].startswith(f"{row.against} scores highest")
        contrary += any("The means order" in text for text in verdict.reason)
    assert 0 < contrary < 20, "in some draws the means say otherwise, and the reasons say so"


def coinciding(judge: dict[str, np.ndarray], people: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Keys]:
    """A third arm, ft, whose answers to the first questions are those of rag wherever the first 60 labels are right."""
    texts = answers()
    texts["ft"] = {f"q{n}": (f"q{n}", "?", f"ft says {n}") for n in range(N)}
    for n in range(60):
        if people["rag"][n] == 1:
            texts["ft"][f"q{n}"] = texts["rag"][f"q{n}"]
    return judge | {"ft": judge["rag"]}, texts


def test_labels_made_before_an_arm_was_added_do_not_correct_by_its_answers_that_happen_to_have_one() -> None:
    people, judge = world()
    given = labelled(people, 60)
    three, texts = coinciding(judge, people)
    checked, correcting = checking.check(scores(three), texts, given, JUDGED)
    assert checked is not None
    num_right = int(people["rag"][:60].sum())
    assert num_right > MIN_QUESTIONS
    assert (checked.corrected, correcting) == (False, None)
    assert (checked.questions, checked.partly, checked.needed) == (num_right, 60 - num_right, 60 - num_right)
    warning = checking.warnings(checked, JUDGED)[0]
    assert f"label {60 - num_right} questions more (ragtune label CONFIG, with --questions as before)" in warning
    shown = {arm: each.people and each.people.n for arm, each in checked.arms.items()}
    assert shown == {"base": 60, "rag": 60, "ft": None}, "the labels that ft happens to have are all right"
    rest = [f"q{n}" for n in range(60) if texts["ft"][f"q{n}"] != texts["rag"][f"q{n}"]]
    more = [Label(name, "?", texts["ft"][name][2], 0.5, "ann", "") for name in rest]
    checked, correcting = checking.check(scores(three), texts, Labels((*given.rows, *more)), JUDGED)
    assert checked is not None
    assert (checked.corrected, checked.partly, checked.needed) == (True, 0, 0)
    assert correcting is not None
    assert len(correcting["ft"]) == 60


def test_one_question_that_is_labelled_in_part_holds_up_nothing() -> None:
    people, judge = world()
    given = labelled(people, MIN_QUESTIONS + 1)
    checked, correcting = checking.check(scores(judge), answers(), Labels(given.rows[:-1]), JUDGED)
    assert checked is not None
    assert (checked.corrected, checked.partly, checked.questions) == (True, 1, MIN_QUESTIONS)
    assert correcting is not None
    assert len(correcting["rag"]) == MIN_QUESTIONS


def test_labels_of_other_questions_with_the_same_ids_are_others() -> None:
    people, judge = world()
    rows = tuple(dataclasses.replace(row, query="another?") for row in labelled(people, 50).rows)
    checked, correcting = checking.check(scores(judge), answers(), Labels(rows), JUDGED)
    assert checked is not None
    assert (correcting, checked.questions, checked.others, checked.needed) == (None, 0, 100, MIN_QUESTIONS)


def test_without_labels_the_judge_is_unchecked() -> None:
    assert checking.check(scores(world()[1]), answers(), Labels(), JUDGED) == (None, None)
    assert checking.warnings(None, JUDGED) == [
        "The verdict rests on a judge that nobody has checked: label some answers (ragtune label CONFIG)."
    ]
    assert checking.warnings(None, config.Config()) == []


def test_another_metric_is_checked_but_not_corrected() -> None:
    people, judge = world()
    given = labelled(people, 50)
    checked, correcting = checking.check(scores(judge, "token_F1"), answers(), given, config.Config())
    assert correcting is None
    assert checked is not None
    assert (checked.metric, checked.corrected, checked.needed) == ("token_F1", False, 0)
    assert checking.warnings(checked, config.Config()) == []
    people_alone = checked.arms["rag"].people
    assert people_alone is not None
    assert people_alone.value == pytest.approx(people["rag"][:50].mean())
    decided = JUDGED.with_values({"compare.until": "decided"})
    looked, correcting = checking.check(scores(judge), answers(), given, decided)
    assert correcting is None
    assert "compare.until=decided" in checking.warnings(looked, decided)[0]


def test_labels_that_do_not_count_are_named() -> None:
    people, judge = world()
    other = Label("q1", "?", "an answer of another run", 1.0, "ann", "")
    second = labelled(people, 3, "bob").rows
    given = Labels((*labelled(people, 50).rows, other, *second), ("line 9: this is no JSON object",), "labels.jsonl")
    checked, _ = decide(given, judge)
    assert checked is not None
    assert (checked.others, checked.between) == (
        1,
        dataclasses.replace(checked.between or Agreement(0, 0), n=6, alike=6),
    )
    assert checking.warnings(checked, JUDGED) == [
        "1 labelled answers are not of this run, and do not count here.",
        "labels.jsonl: 1 lines are no labels; the first: line 9: this is no JSON object.",
    ]
    assert "People with each other: 6 of 6 answers alike" in checking.reasons(checked)[1]
