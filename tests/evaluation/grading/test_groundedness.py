"""Groundedness and ALCE's citation metrics, against values counted by hand."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from ragtune_ray.evaluation.grading import graders, groundedness
from ragtune_ray.evaluation.grading.asking import Asker
from ragtune_ray.evaluation.grading.task import Grade, Task
from ragtune_ray.generation.interface import Completion
from ragtune_ray.schema import Citation, Message, Query
from tests.support.comparisons import answer_row


class Words:
    """Entails what has all its words in the premise."""

    def __init__(self) -> None:
        self.read: list[tuple[str, str]] = []

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        self.read += pairs
        return np.array([float(set(b.split()) <= set(a.split())) for a, b in pairs])


PASSAGES = ("a b", "c d", "a c", "x")


def graded(sentences: tuple[str, ...], cited: tuple[tuple[int, ...], ...]) -> dict[str, float]:
    (made,) = groundedness.NliGrader(Words()).grade([Task("q", (), "", PASSAGES, sentences, cited)])
    return dict(made.values)


@pytest.mark.parametrize(
    ("sentences", "cited", "grounded", "recall", "precision"),
    [
        (("a b",), ((0,),), 1.0, 1.0, 1.0),
        (("a b",), ((1,),), 0.0, 0.0, 0.0),  # another passage supports it, but not the cited one
        (("a b",), ((),), 1.0, 0.0, None),  # no citation: any passage in the prompt
        (("z",), ((),), 0.0, 0.0, None),
        (("a d",), ((0, 1),), 1.0, 1.0, 1.0),  # only together, so both are needed
        (("a b",), ((0, 3),), 1.0, 1.0, 0.5),  # the second is not needed
        (("a d",), ((0, 1, 3),), 1.0, 1.0, 2 / 3),
        (("a d",), ((),), 1.0, 0.0, None),  # all in the prompt together
        (("a b", "z", "c"), ((0,), (0, 1), ()), 2 / 3, 1 / 3, 1 / 3),
    ],
)
def test_sentences_are_checked_against_what_they_cite(
    sentences: tuple[str, ...],
    cited: tuple[tuple[int, ...], ...],
    grounded: float,
    recall: float,
    precision: float | None,
) -> None:
    found = graded(sentences, cited)
    assert found.pop("groundedness") == pytest.approx(grounded)
    assert found.pop("citation_support_recall") == pytest.approx(recall)
    assert found.pop("citation_support_precision", None) == (None if precision is None else pytest.approx(precision))
    assert found == {}


def test_equal_pairs_are_read_once() -> None:
    model = Words()
    task = Task("q", (), "", PASSAGES, ("a b",), ((),))
    groundedness.NliGrader(model).grade([task, task])
    assert len(model.read) == len(set(model.read)) == len(PASSAGES) + 1


class Scripted:
    """A generator that replies with these texts."""

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)
        self.prompts: list = []

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [1] * len(texts)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        return str(messages)

    def generate(self, prompts: Sequence, **_: object) -> list[Completion]:
        self.prompts += prompts
        return [Completion(self.replies.pop(0), 1, 1, 0.0, "stop", "") for _ in prompts]


def listed(*passages: list[int], reason: str = "") -> str:
    rows = [{"sentence": number, "passages": each} for number, each in enumerate(passages, 1)]
    return json.dumps({"sentences": rows, "reason": reason})


def test_a_judge_lists_the_passages_that_support_each_sentence() -> None:
    task = Task("q", (), "", PASSAGES, ("a b", "z", "c"), ((0,), (0, 1), ()))
    (made,) = groundedness.JudgedGroundedness(Asker(Scripted(listed([1, 3], [], [2, 3])), 64)).grade([task])
    assert made.values == pytest.approx(
        {"groundedness": 2 / 3, "citation_support_recall": 1 / 3, "citation_support_precision": 1 / 3}
    )
    assert made.reason == "not supported: z"


@pytest.mark.parametrize(
    "reply",
    [
        "{}",
        '{"sentences": 3}',
        '{"sentences": [1]}',
        listed(),
        listed([1], [2]),
        listed([5]),
        listed([0]),
        '{"sentences": [{"sentence": 1, "passages": [true]}]}',
        '{"sentences": [{"sentence": 1, "passages": "1"}]}',
        '{"sentences": [{"sentence": 2, "passages": [1]}]}',
    ],
)
def test_a_list_that_does_not_fit_the_answer_is_asked_for_again(reply: str) -> None:
    task = Task("q", (), "", PASSAGES, ("a b",), ((0,),))
    generator = Scripted(reply, listed([1]))
    (made,) = groundedness.JudgedGroundedness(Asker(generator, 64)).grade([task])
    assert made.values["groundedness"] == 1.0
    assert made.requests == 2
    assert "That cannot be used" in generator.prompts[1].messages[-1][1]


QUERY = Query("q", "Who?", None, (), (), "test")


def test_the_task_has_the_sentences_and_what_each_cites() -> None:
    citation = Citation("d#1", "d", 0, 1)
    row = answer_row("q", "It is far. It is old.", ("d#0", "d#1"), citations=(citation,))
    texts = {"d#0": "zero", "d#1": "one"}
    task = graders.task_of("groundedness", QUERY, row, texts, ())
    assert task == Task("Who?", (), row.answer, ("zero", "one"), ("It is far.", "It is old."), ((1,), (1,)))
    marked = answer_row(
        "q", row.answer, row.passage_ids, citations=(citation,), sentence_citations=((), ("d#1", "gone"))
    )
    task = graders.task_of("groundedness", QUERY, marked, texts, ())
    assert isinstance(task, Task)
    assert task.cited == ((), (1,))


def test_an_arm_without_passages_is_not_grounded_and_a_right_abstention_is() -> None:
    zero = Grade({"groundedness": 0.0, "citation_support_recall": 0.0})
    assert graders.task_of("groundedness", QUERY, answer_row("q", "me"), {}, ("evidence",)) == zero
    unanswerable = Query("q", "Who?", (), (), (), "test")
    abstained = answer_row("q", "I don't know.", abstained=True)
    assert graders.task_of("groundedness", unanswerable, abstained, {}, ()) == Grade({"groundedness": 1.0})
    assert graders.task_of("groundedness", QUERY, abstained, {}, ()) == zero


def test_a_judge_checks_an_arm_without_passages_against_those_of_another() -> None:
    task = graders.task_of("judge", QUERY, answer_row("q", "me"), {}, ("evidence",))
    assert task == Task("Who?", (), "me", ("evidence",))
    row = answer_row("q", "me", ("d#0",))
    own = graders.task_of("judge", QUERY, row, {"d#0": "zero"}, ("evidence",))
    assert isinstance(own, Task)
    assert own.passages == ("zero",)
    nothing = graders.task_of("judge", QUERY, answer_row("q", "me"), {}, ())
    assert isinstance(nothing, Grade)
    assert "neither" in nothing.error or "no gold answers" in nothing.error


def test_the_turns_before_a_question_are_read_with_it() -> None:
    turns = (Message("system", "Be brief."), Message("user", "Who was first?"), Message("assistant", "Armstrong."))
    query = Query("q", "And second?", ("Aldrin",), (), (), "test", turns)
    task = graders.task_of("judge", query, answer_row("q", "Aldrin"), {}, ())
    assert isinstance(task, Task)
    assert task.query == "user: Who was first?\nassistant: Armstrong.\nAnd second?"


def test_answers_that_nobody_reads_are_not_relevant() -> None:
    for row in (
        answer_row("q", "I don't know.", abstained=True),
        answer_row("q", ""),
        answer_row("q", status="failed"),
    ):
        made = graders.task_of("judge", QUERY, row, {}, ("evidence",))
        assert made == Grade({"judge": 0.0, "relevance": 0.0}), "an arm's mean is over all questions"
    known = Query("q", "Who?", ("me",), (), (), "test")
    assert graders.task_of("judge", known, answer_row("q", ""), {}, ()) == Grade({"judge": 0.0})
