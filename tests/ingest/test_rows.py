"""Rows become documents and queries, or a ParseError with the reason."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from ragtune_ray.ingest.parsing.text import ParseError
from ragtune_ray.ingest.rows import document_from_row, parse_json, query_from_row, spellings_of_ids, squad_contexts

LIMIT = 1_000_000


def row(**fields: Any) -> dict[str, Any]:
    return {"id": "a", "text": "Mars."} | fields


def reason(call: Any, *arguments: Any) -> str:
    with pytest.raises(ParseError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a": NaN}', "NaN is not allowed"),
        (b'{"a": -Infinity}', "-Infinity is not allowed"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1} x', "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b"1" * 5_000, "not JSON"),
    ],
)
def test_json_is_parsed_strictly(data: bytes, expected: str) -> None:
    assert expected in reason(parse_json, data)


def test_metadata_combines_its_object_and_other_scalar_columns() -> None:
    document = document_from_row(
        row(metadata={"b": [1], "year": 1}, year=2, z=True, none=None, nan=float("nan"), document_id=7),
        "p",
        LIMIT,
    )
    assert document.document_id == "7"
    assert document.metadata == '{"b": [1], "id": "a", "year": 1, "z": true}'
    lists = row(tags=["a", "b"], none=[], vector=[0.5] * 101, objects=[{"a": 1}], object={"a": 1}, mixed=[1, "x"])
    assert document_from_row(lists, "p", LIMIT).metadata == '{"mixed": [1, "x"], "tags": ["a", "b"]}'
    assert document_from_row(row(title=" A\n b "), "p", LIMIT).title == "A b"
    assert document_from_row(row(metadata='{"a": 1}'), "p", LIMIT).metadata == '{"a": 1}'
    assert document_from_row(row(), "p", LIMIT).metadata == "{}"


def test_lone_surrogates_are_replaced_in_every_document_field() -> None:
    bad = json.loads('"x\\ud800"')
    document = document_from_row(row(id=bad, text=bad, title=bad, metadata={bad: bad}), "p", LIMIT)
    assert (document.document_id, document.text, document.title) == ("x\ufffd",) * 3
    assert document.metadata == '{"x\ufffd": "x\ufffd"}'


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1], "must be a JSON object, found list"),
        ({"text": "x"}, "no id"),
        (row(id=None), "no id"),
        (row(id=" "), "id is empty"),
        (row(id="x" * 4097), "id has 4,097 characters; the limit is 4,096"),
        (row(id=True), "id must be text or an integer, found bool"),
        (row(id=1.5), "id must be text or an integer, found float"),
        ({"id": "a", "body": "x"}, "no column 'text'; found body, id"),
        (row(text=5), "text must be text, found int"),
        (row(text=None), "empty document"),
        (row(text=" \n\t"), "empty document"),
        (row(text="é" * 6), "document of 12 bytes is longer than max_document_bytes (11)"),
        (row(title=[1]), "title must be text, found list"),
        (row(metadata=[1]), "metadata must be an object, found list"),
        (row(metadata={"a": float("inf")}), "metadata cannot be written as JSON"),
        (row(score=float("inf")), "metadata cannot be written as JSON"),
    ],
)
def test_bad_document_row_raises_with_the_reason(value: Any, expected: str) -> None:
    assert expected in reason(document_from_row, value, "p", 11)


def test_query_accepts_every_name_of_its_fields() -> None:
    query = query_from_row(
        {"_id": 3, "query": "Why?\r\n", "document_ids": ["a", 2], "relevances": [2, 0.5], "split": "dev"}
    )
    assert (query.query_id, query.text, query.split) == ("3", "Why?\n", "validation")
    assert (query.document_ids, query.relevances) == (("a", "2"), (2.0, 0.5))
    assert query.answers is None
    single = query_from_row({"query_id": "q", "question": "Who?", "document_id": "d"})
    assert (single.document_ids, single.relevances, single.split) == (("d",), (1.0,), "all")


def test_a_question_has_the_messages_before_it() -> None:
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who built Hubble?\r\n"},
        {"role": "assistant", "content": "NASA."},
    ]
    row = {"id": "q", "text": "And when was it launched?"}
    query = query_from_row({**row, "messages": said})
    assert query.history == (("user", "Who built Hubble?\n"), ("assistant", "NASA."))
    assert query.instruction == "Be brief."
    repeated = query_from_row({**row, "messages": [*said, {"role": "user", "content": "And when was it launched? "}]})
    assert repeated == query, "a conversation that ends in the question itself"
    other = [{"role": "user", "content": "Who built Kepler?"}]
    named = {query_from_row({"text": "And when?", "messages": each}).query_id for each in (None, [], said, other, said)}
    assert len(named) == 3, "an id that is made from the text tells conversations apart"
    assert query_from_row({**row, "messages": None}) == query_from_row({**row, "messages": []}) == query_from_row(row)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (None, None),
        ([], ()),
        ("x", ("x",)),
        (["b", "a", "b", " "], ("b", "a")),
        ({"text": ["x"], "answer_start": [1]}, ("x",)),
        ([{"text": "x", "answer_start": 1}], ("x",)),
    ],
)
def test_unknown_empty_and_several_answers_are_distinguished(answers: Any, expected: Any) -> None:
    assert query_from_row({"id": "q", "text": "x", "answers": answers}).answers == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": None}, "no column 'text', 'query' or 'question'"),
        ({"text": " "}, "empty query"),
        ({"text": 1}, "text must be text"),
        ({"answers": [["x"]]}, "an element is not text but list"),
        ({"answers": [None]}, "every answer is blank; write []"),
        ({"document_ids": {"d": 1}}, "document_ids must be text or an integer"),
        ({"document_ids": [1.5]}, "document_ids must be text or an integer"),
        ({"document_ids": ["d"], "relevances": []}, "one number per document id (1)"),
        ({"document_ids": ["d"], "relevances": ["1"]}, "finite numbers"),
        ({"split": 1}, "split must be text"),
        ({"messages": "Who?"}, 'messages must be a list of {"role", "content"}, found str'),
        ({"messages": ["Who?"]}, 'message 1 must be an object {"role", "content"}, found str'),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}]},
            "message 2: role must be one of user, assistant, system, found 'tool'",
        ),
        ({"messages": [{"content": "x"}]}, "found 'None'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "message 1: content must be text, found list",
        ),
        ({"messages": [{"role": "user", "content": " "}]}, "message 1: content is empty"),
        ({"messages": [{"role": "user", "content": "x"}] * 513}, "513 messages; the limit is 512"),
        ({"messages": [{"role": "user", "content": "x" * 50_001}] * 2}, "100,002 characters; the limit is 100,000"),
    ],
)
def test_bad_query_row_raises_with_the_reason(fields: dict[str, Any], expected: str) -> None:
    assert expected in reason(query_from_row, row(**fields))


def test_squad_ids_are_unique_and_contexts_repeat_within_an_article() -> None:
    same = {"context": "same", "qas": []}
    articles = [
        {"title": "X_y", "paragraphs": [same, {"context": "other"}, same]},
        {"title": "X_y", "paragraphs": [same]},
        {"title": "X_y (2)", "paragraphs": [same]},
        {"paragraphs": [{"context": 5}]},
        "garbage",
    ]
    contexts = list(squad_contexts({"data": articles}))
    expected = ["X_y/0", "X_y/1", "X_y/0", "X_y (2)/0", "X_y (2) (2)/0", "untitled/0", "untitled (2)/0"]
    assert [context.document_id for context in contexts] == expected
    assert [context.ordinal for context in contexts] == list(range(7))
    assert [context.is_repeat for context in contexts] == [False, False, True, False, False, False, False]
    assert contexts[0].title == "X y"
    assert "not SQuAD" in reason(lambda: list(squad_contexts({"a": 1})))


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_an_id_has_one_spelling_in_documents_queries_and_qrels() -> None:
    assert document_from_row(row(id=DECOMPOSED + "\r\n1"), "p", LIMIT).document_id == COMPOSED + "\n1"
    assert document_from_row(row(text=DECOMPOSED), "p", LIMIT).text == DECOMPOSED, "a text stays as it is"
    query = query_from_row({"id": DECOMPOSED, "text": "?", "document_ids": [DECOMPOSED, COMPOSED]})
    assert (query.query_id, query.document_ids) == (COMPOSED, (COMPOSED,))
    assert spellings_of_ids([COMPOSED, "a"]) == [COMPOSED, DECOMPOSED, "a"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"answer": "Paris"}, ("Paris",)),
        ({"ground_truth": ["Paris", "Lutetia"]}, ("Paris", "Lutetia")),
        ({"answers": None, "answer": "Paris"}, ("Paris",)),
        ({"answers": [], "answer": "see above"}, ()),
        ({"answers": ["", "Paris"]}, ("Paris",)),
        ({"answer": None}, None),
    ],
)
def test_answers_may_have_other_names(fields: dict[str, Any], expected: Any) -> None:
    assert query_from_row({"id": 1, "text": "?"} | fields).answers == expected


@pytest.mark.parametrize("fields", [{"answers": [""]}, {"answer": " "}, {"answers": {"text": ["", " "]}}])
def test_blank_answers_are_no_unanswerable_question(fields: dict[str, Any]) -> None:
    assert "every answer is blank; write []" in reason(query_from_row, {"id": 1, "text": "?"} | fields)


@pytest.mark.parametrize("depth", [100, 500, 900, 5000])
def test_a_deeply_nested_field_is_a_reject_or_left_out(depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    row = {"id": "e", "text": "V", "x": value}
    if depth < 200:
        assert document_from_row(row, "file:1", 1000).metadata == "{}"
    else:
        with contextlib.suppress(ParseError):
            document_from_row(row, "file:1", 1000)


def test_a_relevance_too_large_for_a_number_is_refused() -> None:
    row = {"id": "q", "text": "Who?", "document_ids": ["a"], "relevances": [10**400]}
    with pytest.raises(ParseError, match="relevances must be finite numbers"):
        query_from_row(row)
