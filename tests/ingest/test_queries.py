"""Queries of every format are read with answers and qrels; bad rows become rejects."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragtune_ray.ingest.input_units import plan_units
from ragtune_ray.ingest.inputs import InputError
from ragtune_ray.ingest.queries import read_queries
from ragtune_ray.schema import Query, Reject
from tests.support.corpora import beir, doc, documents, only_reject, squad, write, write_parquet

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
LIMIT = 1_000_000


def queries(path: Any, split: str = "all") -> list[Query]:
    return [item for item in read_queries(str(path), split) if isinstance(item, Query)]


def test_squad_questions_name_the_documents_of_their_contexts(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write(
        path,
        squad(
            {"id": 1, "question": "A?", "answers": [{"text": "x"}, {"text": "y"}, {"text": "x"}]},
            {"id": "2", "question": "B?", "is_impossible": True, "plausible_answers": [{"text": "p"}]},
            {"id": "3", "question": "C?"},
            {"id": "no question"},
        ),
    )
    assert [(item.document_id, item.title, item.text, item.place) for item in documents(path, unit_bytes=1)] == [
        ("The_Moon/0", "The Moon", "Moon.", f"{path}#0"),
        ("The_Moon/1", "The Moon", "Other.", f"{path}#1"),
    ]
    assert len(plan_units(str(path), 1).units) == path.stat().st_size
    found = queries(path)
    assert [(item.query_id, item.answers) for item in found] == [("1", ("x", "y")), ("2", ()), ("3", None), ("z", ())]
    assert [item.document_ids for item in found] == [("The_Moon/0",)] * 3 + [("The_Moon/1",)]
    assert only_reject(read_queries(str(path))).place == f"{path}#3"


@pytest.mark.parametrize(
    ("name", "num_documents", "num_queries", "num_unanswerable"),
    [("squad/squad-v1.1-24articles.json", 1095, 5322, 0), ("squad/squad-v2.0-articles.json", 501, 5048, 2497)],
)
def test_real_squad_files_are_read_completely(
    name: str, num_documents: int, num_queries: int, num_unanswerable: int
) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"../shared/data/{name} is absent")
    found = documents(SHARED / name, unit_bytes=500_000)
    asked = queries(SHARED / name)
    assert (len(found), len(asked)) == (num_documents, num_queries)
    texts = {item.document_id: item.text for item in found}
    assert len(texts) == num_documents
    assert sum(item.answers == () for item in asked) == num_unanswerable
    assert all(answer in texts[item.document_ids[0]] for item in asked for answer in item.answers or ())


def test_beir_reads_only_the_corpus_and_joins_queries_with_qrels(tmp_path: Path) -> None:
    write(beir(tmp_path) / "notes.md", "ignored")
    assert [(item.document_id, item.metadata) for item in documents(tmp_path)] == [("d1", '{"u": 1}'), ("d2", "{}")]
    (judged, also) = queries(tmp_path, "validation")
    assert (also.query_id, also.document_ids, also.relevances) == ("q1", ("d1", "d2"), (2.0, 0.0))
    assert (judged.query_id, judged.document_ids, judged.split) == ("q0", ("d2",), "validation")
    merged = queries(tmp_path)
    assert [(item.query_id, item.split, item.document_ids) for item in merged] == [
        ("q0", "all", ("d2", "d1")),
        ("q1", "validation", ("d1", "d2")),
        ("q2", "test", ("d2",)),
        ("q3", "all", ()),
    ]
    rejects = [item for item in read_queries(str(tmp_path), "test") if isinstance(item, Reject)]
    assert [item.place for item in rejects] == [
        f"{tmp_path}/qrels/test.tsv:3",
        f"{tmp_path}/qrels/test.tsv:4",
        f"{tmp_path}/queries.jsonl",
    ]
    assert "'gone'" in rejects[2].reason


def test_beir_without_the_requested_qrels_lists_existing_ones(tmp_path: Path) -> None:
    (beir(tmp_path) / "qrels" / "test.tsv").unlink()
    with pytest.raises(InputError, match=r"'test'; qrels/ contains: dev, train"):
        read_queries(str(tmp_path), "test")
    (tmp_path / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"with a queries\.jsonl"):
        read_queries(str(tmp_path))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_queries_are_filtered_by_split(tmp_path: Path, suffix: str) -> None:
    rows = [{"id": f"q{number}", "question": "Q?", "split": ("train", "dev")[number % 2]} for number in range(4)]
    path = tmp_path / f"q.{suffix}"
    if suffix == "jsonl":
        write(path, *rows)
    else:
        pq.write_table(pa.Table.from_pylist([row | {"answers": ["x"], "relevances": None} for row in rows]), path)
    assert [item.query_id for item in queries(path)] == ["q0", "q1", "q2", "q3"]
    assert [item.query_id for item in queries(path, "validation")] == ["q1", "q3"]
    with pytest.raises(InputError, match="no query has split 'test'; found: train, validation"):
        queries(path, "test")


def test_repeated_query_is_rejected_and_two_texts_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", doc("a", "One?"), doc("b", "Two?"), doc("a", "One?"))
    assert [item.query_id for item in queries(path)] == ["a", "b"]
    assert only_reject(read_queries(str(path))) == Reject(
        f"{path}:3", f"query id 'a' is already used at {path}:1", "row"
    )
    write(path, doc("a", "One?"), doc("a", "Other?"))
    with pytest.raises(InputError, match=r"'a' has two texts, at .*q\.jsonl:1 and .*q\.jsonl:2"):
        queries(path)
    write(path, doc("a", "One?"), {**doc("a", "One?"), "messages": [{"role": "user", "content": "Which?"}]})
    with pytest.raises(InputError, match=r"'a' has two conversations, at .*q\.jsonl:1 and .*q\.jsonl:2"):
        queries(path)


def test_unusable_query_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "zero.jsonl").touch()
    write(tmp_path / "a.md", "x")
    write(tmp_path / "a.json", "{")
    (tmp_path / "b.parquet").write_bytes(b"garbage" * 9)
    write_parquet(tmp_path / "c.parquet", {"id": ["a"], "body": ["x"]})
    for name, expected in (
        ("missing.jsonl", "no such file"),
        ("zero.jsonl", "empty"),
        ("a.md", "queries are read from"),
        ("a.json", "not JSON"),
        ("b.parquet", "Parquet is broken"),
        ("c.parquet", "no column 'text' or 'query' or 'question' or 'user_input'; found id, body"),
    ):
        with pytest.raises(InputError) as caught:
            queries(tmp_path / name)
        assert expected in str(caught.value)
        assert name in str(caught.value)


EXPORTED = {
    "q.csv": 'Question,Answers,document_ids\nWho?,"[""Ann"", ""Anna""]",a.md\n"What, then?",,\n',
    "q.tsv": "question\tanswers\tdocument_ids\nWho?\t['Ann', 'Anna']\ta.md\nWhat, then?\t\t\n",
    "list.json": '[{"question": "Who?", "answers": ["Ann", "Anna"], "document_ids": "a.md"}, {"question": "What, then?"}]',
    "llama.json": '{"examples": [{"query": "Who?", "reference_answer": ["Ann", "Anna"], "document_id": "a.md"}, {"query": "What, then?"}]}',
}


@pytest.mark.parametrize("name", EXPORTED)
def test_tables_and_lists_of_json_are_files_of_questions(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(EXPORTED[name])
    found = [(item.text, item.answers, item.document_ids) for item in queries(tmp_path / name)]
    assert found == [("Who?", ("Ann", "Anna"), ("a.md",)), ("What, then?", None, ())]


def test_what_is_read_as_meant_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "q.jsonl", {"id": 1, "text": "Ok?", "answer": True, "note": "x"}, {"id": 2, "text": "?", "answer": 4}
    )
    assert [item.answers for item in queries(path)] == [("yes", "true"), ("4",)]
    queries(path)
    assert capsys.readouterr().err.splitlines() == [
        f"{path}: true and false are read as the answers yes and no (1 row)",
        f"{path}: numbers are read as text (1 row)",
    ]
    counted: Counter[str] = Counter()
    list(read_queries(str(path), notices=counted))
    assert counted["not read: column `note`"] == 1
