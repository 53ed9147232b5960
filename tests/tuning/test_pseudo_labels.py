"""Filters of pseudo-labels, each on its own."""

import dataclasses

import pytest

from ragtune_ray.schema import Answer, Citation, Passage, Query
from ragtune_ray.tuning import pseudo_labels as checks

MOON = Passage("moon#0", "moon", "Apollo 11 landed on the Moon in July 1969.", "The Moon", "{}", 0, 42)
QUERY = Query("q", "When did Apollo 11 land?", None, (), (), "train")


def answer(text: str, cited: str = "moon#0", **changes: object) -> Answer:
    citations = (Citation(cited, cited.partition("#")[0], 0, 42),) if cited else ()
    row = Answer("q", "?", text, citations, ("moon#0",), (1.0,), False, 0.0, 1, 1, "ok", "", "1", "m")
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (answer("July 1969."), ""),
        (answer("1968"), "is not in a passage that it cites"),
        (answer("1969", cited=""), "is not in a passage"),
        (answer("1969", cited="mars#0"), "is not in a passage"),
        (answer("July 1969", abstained=True), "was not answered"),
        (answer("1969", status="failed"), "was not answered"),
        (answer(MOON.text * 4), "not a short phrase"),
    ],
)
def test_an_answer_must_be_in_the_passage_it_cites(row: Answer, problem: str) -> None:
    found = checks.support_problem(row, {"moon#0": MOON})
    assert (problem in found) if problem else found == ""


def test_a_required_share_of_samples_must_agree() -> None:
    def problem(least: float) -> str:
        return checks.agreement_problem("July 1969", ["July 1969", "in July 1969", "Mars"], least, "en")

    assert problem(0.66) == ""
    assert problem(0.67) == "samples of its answer do not agree"
    assert checks.agreement_problem("x", [], 1.0, "en") == ""


def test_the_round_trip_compares_with_the_answer_from_the_passage_alone() -> None:
    assert checks.regenerated_problem("1969", answer("in 1969"), 0.6, "en") == ""
    assert "another answer" in checks.regenerated_problem("1969", answer("1970"), 0.6, "en")
    assert "was not answered" in checks.regenerated_problem("1969", None, 0.6, "en")
    assert "was not answered" in checks.regenerated_problem("1969", answer("1969", status="failed"), 0.6, "en")


def test_trust_begins_at_the_lowest_confidence_with_enough_correct_answers() -> None:
    # By hand: of 22 answers at .9 20 are correct, of 8 at .6 six, of 10 at .3 none.
    confidences = [0.9] * 22 + [0.6] * 8 + [0.3] * 10
    is_right = [True] * 20 + [False] * 2 + [True] * 6 + [False] * 2 + [False] * 10
    assert checks.trusted_confidence(confidences, is_right, 0.8) == (0.6, pytest.approx(27 / 32))
    assert checks.trusted_confidence(confidences, is_right, 0.85) == (0.9, pytest.approx(21 / 24))
    assert checks.trusted_confidence(confidences, is_right, 0.6) == (0.3, pytest.approx(27 / 42))
    assert checks.trusted_confidence(confidences, is_right, 0.9) == (None, pytest.approx(21 / 24))
    assert checks.trusted_confidence(confidences[:19], is_right[:19], 0.8) == (None, 0.0), "too few answers"
    assert checks.trusted_confidence([], [], 0.8) == (None, 0.0)


def test_an_answer_below_the_trusted_confidence_is_refused() -> None:
    assert checks.confidence_problem(answer("1969", confidence=0.7), 0.7) == ""
    assert "not confident" in checks.confidence_problem(answer("1969", confidence=0.69), 0.7)
    assert "not confident" in checks.confidence_problem(answer("1969", confidence=None), 0.1)


def test_a_label_is_the_bare_answer_and_its_document() -> None:
    made = checks.labelled(QUERY, "July 1969.", MOON)
    assert (made.answers, made.document_ids, made.relevances, made.split) == (
        ("July 1969",),
        ("moon",),
        (1.0,),
        "train",
    )


def test_pseudo_labels_keep_their_share_and_depend_on_the_seed() -> None:
    rows = [dataclasses.replace(QUERY, query_id=f"q{number:02d}") for number in range(50)]
    kept = checks.capped(rows, num_gold=30, share=0.25, seed=0)
    assert len(kept) == 10
    assert len(kept) / (30 + len(kept)) == 0.25
    assert kept == checks.capped(rows[::-1], 30, 0.25, 0)
    assert kept != checks.capped(rows, 30, 0.25, 1)
    assert checks.capped(rows, 0, 0.25, 0) == rows
