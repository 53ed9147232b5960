"""Records and Arrow tables: round trips and refused tables."""

import dataclasses

import pyarrow as pa
import pytest

from ragtune_ray import schema

ANSWER = schema.Answer(
    query_id="q1",
    query="Who?",
    answer="Ada",
    citations=(schema.Citation("d#0", "d", 3, 9),),
    passage_ids=("d#0", "e#1"),
    scores=(0.5, 0.25),
    abstained=False,
    seconds=0.1,
    prompt_tokens=10,
    completion_tokens=2,
    status="ok",
    error="",
    index_version="000001",
    model="m",
)


@pytest.mark.parametrize(
    "row",
    [
        ANSWER,
        schema.Query("q", "Who?", None, (), (), "all"),
        schema.Query("q", "Who?", (), ("d",), (1.0,), "test"),
        schema.Query("q", "谁?", ("甲", "乙"), ("d", "e"), (1.0, 0.0), "test"),
        schema.Query(
            "q", "When?", None, (), (), "all", (schema.Message("user", "Who?"), schema.Message("assistant", "A."))
        ),
        schema.Passage("d#0", "d", "text", "", "{}", 0, 4),
        schema.Hit("q", "d#0", "d", 1, 0.5),
    ],
)
def test_a_record_is_unchanged_by_a_round_trip_through_arrow(row: object) -> None:
    assert list(schema.from_table(schema.to_table([row], type(row)), type(row))) == [row]


def test_unknown_and_empty_answers_remain_distinct() -> None:
    rows = [schema.Query("a", "x", None, (), (), "all"), schema.Query("b", "x", (), (), (), "all")]
    restored = list(schema.from_table(schema.to_table(rows, schema.Query), schema.Query))
    assert [row.answers for row in restored] == [None, ()]


def test_answers_have_exactly_the_documented_columns() -> None:
    assert schema.arrow_schema(schema.Answer).names == [
        "query_id",
        "query",
        "answer",
        "citations",
        "passage_ids",
        "scores",
        "abstained",
        "seconds",
        "prompt_tokens",
        "completion_tokens",
        "status",
        "error",
        "index_version",
        "model",
        "confidence",
        "cut",
        "sentence_citations",
    ]


def test_a_file_from_before_the_column_cut_is_read() -> None:
    table = schema.to_table([ANSWER], schema.Answer).drop_columns(["cut"])
    assert list(schema.from_table(table, schema.Answer)) == [ANSWER]
    assert schema.conformed(table, schema.Answer).equals(schema.to_table([ANSWER], schema.Answer))


def test_queries_from_before_the_column_messages_stand_alone() -> None:
    rows = [schema.Query("q", "Who?", None, (), (), "all"), schema.Query("r", "When?", (), (), (), "all")]
    table = schema.to_table(rows, schema.Query)
    assert list(schema.from_table(table.drop_columns(["messages"]), schema.Query)) == rows
    assert schema.conformed(table.drop_columns(["messages"]), schema.Query).equals(table)


def test_the_identity_of_a_question_is_older_than_its_messages() -> None:
    """Fingerprints of queries name the runs of every older workspace."""
    alone = schema.Query("q", "When?", ("1990",), ("d",), (1.0,), "test")
    assert alone.identity() == ("q", "When?", ("1990",), ("d",), (1.0,), "test")
    asked = dataclasses.replace(alone, messages=(schema.Message("user", "Who?"),))
    assert asked.identity() == (*alone.identity(), (("user", "Who?"),))


def test_a_missing_column_is_refused_by_name() -> None:
    table = schema.to_table([ANSWER], schema.Answer).drop_columns(["model"])
    with pytest.raises(schema.SchemaError, match=r"Answer\.model should be string, found no such column"):
        list(schema.from_table(table, schema.Answer))


def test_a_column_of_the_wrong_type_is_refused_by_name() -> None:
    table = pa.table({name: [1] for name in schema.arrow_schema(schema.Hit).names})
    with pytest.raises(schema.SchemaError, match=r"Hit\.query_id should be string, found int64"):
        schema.check(table.schema, schema.Hit)
