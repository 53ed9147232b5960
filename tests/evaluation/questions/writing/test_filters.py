"""Filters of questions, each on its own: what they throw out, and what they must not."""

import json
from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.config.evaluation import QuestionKind, Questions
from ragtune_ray.evaluation.grading.asking import ReplyError
from ragtune_ray.evaluation.questions.writing import filters
from ragtune_ray.evaluation.questions.writing.drafts import Draft, draft_of, question_in
from ragtune_ray.evaluation.questions.writing.evidence import cited, find_quotation
from ragtune_ray.schema import Passage

SPACE = Path(__file__).parents[4] / "data" / "space"
MOON = Passage("moon#0", "moon", "Apollo 11 landed on the Moon in July 1969.", "The Moon", "{}", 0, 42)


@pytest.mark.parametrize(
    ("question", "problem"),
    [
        ("When did Apollo 11 land on the Moon?", None),
        ("登月是哪一年发生的？", None),
        ("Wann landete Apollo 11 auf dem Mond?", None),
        ("東京タワーは何年に完成しましたか。", None),
        ("東京タワーは何年に完成しましたか", None),
        ("東京タワーは1958年に完成しました。", "not a question"),
        ("หอไอเฟลสูงกี่เมตร", None),
        ("Apollo 11 landed.", "not a question"),
        ("When? And\nwhy?", "not a question"),
        ("Why not?", "too short"),
        ("What does the passage say?", "points at the passage"),
        ("What is the answer to this question?", "points at the passage"),
        ("According to the text, when did it land?", "points at the passage"),
        ("Was steht laut diesem Abschnitt über Apollo 11?", "points at the passage"),
        ("根据这段文字，登月是哪一年？", "points at the passage"),
        ("Which article of the treaty bans weapons in orbit?", None),
        ("Apollo 11 landed on the Moon?", "copies the passage"),
        ("Apollo 11 landed on the Moon in which July?", "copies the passage"),
    ],
)
def test_a_question_must_stand_alone_and_be_no_copy(question: str, problem: str | None) -> None:
    assert filters.plain_problem(question, MOON, "en", "strict") == problem


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("When did it land?", "When did it land?"),
        ("**Question 1:** When did it land?\nAnswer: 1969", "When did it land?"),
        ("Q: When did\nit land? And why?", "When did it land?"),
        ("问题：登月是哪一年发生的？答案：1969", "登月是哪一年发生的？"),
        ("Questions of faith: who answers them?", "Questions of faith: who answers them?"),
        ("It landed in 1969.", "It landed in 1969."),
    ],
)
def test_the_question_is_extracted_from_plain_text(text: str, question: str) -> None:
    assert question_in(text) == question


@pytest.mark.parametrize(
    ("question", "answer", "kind", "is_given"),
    [
        ("Which rocket, the Saturn V, flew to the Moon?", "Saturn V", "fact", True),
        ("Which rocket flew to the Moon?", "Saturn V", "fact", False),
        ("Which is older, Hubble or Webb?", "Hubble", "comparison", False),
        ("Why does iron rust in wet air and at night?", "Iron rusts in wet air at night.", "sentences", True),
        ("Why does iron rust?", "It reacts with oxygen once water lets ions move.", "sentences", False),
        ("阿波罗11号是哪一年登月的？", "1969年", "fact", False),
    ],
)
def test_a_question_must_not_give_its_answer_away(
    question: str, answer: str, kind: QuestionKind, *, is_given: bool
) -> None:
    language: config.Language = "en" if question.isascii() else "zh"
    assert filters.gives_away(question, answer, kind, language, "strict") == is_given


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Is the Moon made of rock?", "rock", True),
        ("Ist der Mond ein Planet?", "Nein, ein Mond", True),
        ("登月发生在1969年吗？", "是的", True),
        ("Is it made of rock or of cheese?", "rock", False),
        ("How many moons has Mars?", "2", False),
    ],
)
def test_yes_and_no_are_recognised(question: str, answer: str, *, expected: bool) -> None:
    assert filters.is_yes_no(question, answer) == expected


def test_quotations_are_found_exactly_or_not_at_all() -> None:
    text = "It said:\n\u201cGo  now\u201d \u2013 in 1969, at 4\u00a0pm."
    assert text[slice(*(find_quotation('"Go now" - in 1969', text) or (0, 0)))] == "\u201cGo  now\u201d \u2013 in 1969"
    for wrong in ('"go now"', "in 1968", "Go later", "at", "a.*m"):
        assert find_quotation(wrong, text) is None, wrong
    moved = Passage("d#1", "d", text, "", "{}", 500, 500 + len(text))
    (span,) = cited(["in 1969"], [MOON, moved]) or ()
    assert (span.passage_id, text[span.start - 500 : span.end - 500]) == ("d#1", "in 1969")
    assert cited(["in 1969", "never"], [moved]) is None


@pytest.mark.parametrize(
    "value",
    [
        {}, {"question": 3.5, "answer": "x"}, {"question": "Who?", "answer": " ", "evidence": ["x"]}, {"question": ["Who?"]},
        {"question": "Who?", "answer": "x", "evidence": []}, {"question": "Who?", "answer": "x", "evidence": [1]},
        {"question": "...", "answer": "...", "evidence": ["..."]}, {"question": "Who?", "answer": "x" * 3000, "evidence": ["x"]},
        {"question": "Who?", "answer": True, "evidence": ["x"]},
    ],
)  # fmt: skip
def test_an_incomplete_reply_is_malformed(value: dict[str, object]) -> None:
    with pytest.raises(ReplyError):
        draft_of("fact", value)


def test_questions_that_people_wrote_pass() -> None:
    """The 413 answerable questions of the demo corpus: a filter that throws them out is too strict."""
    rule, refused = Questions(), []
    lines = [json.loads(line) for line in (SPACE / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [line for line in lines if line["answers"]]
    for line in asked:
        text = (SPACE / "documents" / line["document_ids"][0]).read_text(encoding="utf-8")
        passage = Passage("d#0", "d", text, "", "{}", 0, len(text))
        given = next((answer for answer in line["answers"] if answer in text), line["answers"][0])
        draft = Draft(line["text"], given, (text[:200],))
        if reason := filters.draft_problem(draft, "fact", [passage], rule, "en", "strict"):
            refused.append((reason, line["text"]))
    assert len(asked) == 413
    assert len(refused) <= 8, refused
