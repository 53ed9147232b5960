"""Rows of other tools become the questions that a person would read in them; the rest is refused or noted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from ragtune_ray.ingest.exports.fields import Notices, query_fields
from ragtune_ray.ingest.parsing.text import ParseError
from ragtune_ray.ingest.rows import query_from_row
from ragtune_ray.schema import Message, Query


def read(row: dict[str, Any]) -> tuple[Query, Notices]:
    notices: Notices = Counter()
    return query_from_row(row, notices), notices


CONTEXT = "is not read; name the documents that answer a question in `document_ids`"


@pytest.mark.parametrize(
    ("row", "answers", "noted"),
    [
        pytest.param({"user_input": "Who?", "reference": "Ann", "response": "Bob", "retrieved_contexts": ["c"]}, ("Ann",), {f"`retrieved_contexts` {CONTEXT}", "not read: column `response`"}, id="ragas"),
        pytest.param({"question": "Who?", "answer": "Bob", "ground_truth": "Ann"}, ("Ann",), {"`answer` is not read where `ground_truth` is given"}, id="ragas-0.1"),
        pytest.param({"question": "Who?", "ground_truths": ["Ann", "Anna"]}, ("Ann", "Anna"), set(), id="ragas-0.0"),
        pytest.param({"input": "Who?", "expected_output": "Ann", "actual_output": "Bob", "context": ["c"]}, ("Ann",), {f"`context` {CONTEXT}", "not read: column `actual_output`"}, id="deepeval"),
        pytest.param({"inputs": {"question": "Who?"}, "outputs": {"answer": "Ann"}}, ("Ann",), set(), id="LangSmith"),
        pytest.param({"input": [{"role": "system", "content": "s"}, {"role": "user", "content": "Who?"}], "ideal": ["Ann"]}, ("Ann",), set(), id="OpenAI-evals"),
        pytest.param({"item": {"input": "Who?", "ideal": "Ann"}}, ("Ann",), set(), id="OpenAI-evals-API"),
        pytest.param({"query": "Who?", "expected_response": "Ann"}, ("Ann",), set(), id="TruLens"),
        pytest.param({"query": "Who?", "reference_answer": "Ann", "reference_contexts": []}, ("Ann",), set(), id="LlamaIndex"),
        pytest.param({" Question": "Who?", "Expected Answer": "Ann"}, ("Ann",), set(), id="spreadsheet"),
        pytest.param({"text": "Who?", "is_impossible": True, "answers": {"text": []}}, (), set(), id="SQuAD-v2"),
        pytest.param({"text": "Who?", "is_impossible": "TRUE", "answer": ""}, (), set(), id="CSV-true"),
        pytest.param({"text": "Who?", "unanswerable": 1.0, "answer": float("nan")}, (), set(), id="pandas-true"),
        pytest.param({"text": "Who?", "is_impossible": "no", "answer": "Ann"}, ("Ann",), set(), id="CSV-false"),
        pytest.param({"text": "Who?", "is_impossible": "", "answer": "Ann"}, ("Ann",), set(), id="CSV-empty"),
    ],
)  # fmt: skip
def test_exports_of_other_tools_are_read_as_meant(row: dict[str, Any], answers: Any, noted: set[str]) -> None:
    query, notices = read(row)
    assert (query.text, query.answers) == ("Who?", answers)
    assert set(notices) - {"no id: made from the text of the question"} == noted


def test_earlier_turns_of_an_input_become_messages() -> None:
    turns = [{"role": "user", "content": "Who built it?"}, {"role": "assistant", "content": "Ann."}]
    query, notices = read({"id": 1, "input": [*turns, {"role": "user", "content": "When?"}], "ideal": "1969"})
    assert query.text == "When?"
    assert query.messages == (Message("user", "Who built it?"), Message("assistant", "Ann."))
    assert not notices


@pytest.mark.parametrize(
    ("given", "answers", "noted"),
    [
        (42, ("42",), "numbers are read as text"),
        ([4.0, 4.5], ("4", "4.5"), "numbers are read as text"),
        (True, ("yes", "true"), "true and false are read as the answers yes and no"),
        (["Ann", None, " "], ("Ann",), "blank answers beside others are left out"),
        (float("nan"), None, None),
        ([], (), None),
        (None, None, None),
    ],
)
def test_answers_that_are_not_text_are_read_as_text(given: Any, answers: Any, noted: str | None) -> None:
    query, notices = read({"id": 1, "text": "?", "answer": given})
    assert query.answers == answers
    assert list(notices) == ([noted] if noted else [])


def test_a_question_without_an_id_gets_one_from_its_text() -> None:
    first, second, other = (read({"text": text})[0].query_id for text in ("Who?", "Who?", "When?"))
    assert first == second != other
    assert first.startswith("q-")


def test_one_document_id_is_a_list_of_one() -> None:
    assert query_fields({"id": 1, "text": "?", "document_ids": "a.md"}, Counter())["document_ids"] == ["a.md"]
    assert query_fields({"id": 1, "text": "?", "document_id": ["a", "b"]}, Counter())["document_ids"] == ["a", "b"]
    assert f"`contexts` {CONTEXT}" not in read({"id": 1, "text": "?", "contexts": ["c"], "document_id": "a"})[1]


def test_a_truth_value_that_is_none_is_refused() -> None:
    with pytest.raises(ParseError, match=r"`is_impossible` is 'perhaps'; it must be true or false"):
        read({"text": "Who?", "is_impossible": "perhaps"})
