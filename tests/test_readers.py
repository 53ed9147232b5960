"""Inputs of every format are cut into units and read back; what cannot be read is named, counted and left out."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.spec import AbstractBufferedFile
from hypothesis import given, settings
from hypothesis import strategies as st

from ragtune_ray import readers
from ragtune_ray.readers import InputError, plan_units, read_documents, read_queries
from ragtune_ray.schema import Document, Query, Reject

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
LIMIT = 1_000_000


def read(path: Any, unit_bytes: int = LIMIT, limit: int = LIMIT) -> list[Document | Reject]:
    return [item for unit in plan_units(str(path), unit_bytes).units for item in read_documents(unit, limit)]


def documents(path: Any, unit_bytes: int = LIMIT) -> list[Document]:
    items = read(path, unit_bytes)
    assert not [item for item in items if isinstance(item, Reject)]
    return [item for item in items if isinstance(item, Document)]


def only_reject(items: Any) -> Reject:
    (reject,) = [item for item in items if isinstance(item, Reject)]
    return reject


def queries(path: Any, split: str = "all") -> list[Query]:
    return [item for item in read_queries(str(path), split) if isinstance(item, Query)]


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, Any], row_group_size: int = 1_000_000) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def doc(identifier: Any, text: str = "Mars.") -> dict[str, Any]:
    return {"_id": identifier, "text": text}


# Folders of files


def test_a_folder_gives_one_document_per_file_named_by_its_relative_path(tmp_path: Path) -> None:
    write(tmp_path / "b" / "two.txt", "Two")
    write(tmp_path / "a.md", "# One")
    write(tmp_path / "c.html", "<p>Three</p>")
    found = documents(tmp_path)
    assert [(item.document_id, item.title, item.text, item.metadata) for item in found] == [
        ("a.md", "One", "# One\n", "{}"),
        ("b/two.txt", "two", "Two\n", "{}"),
        ("c.html", "c", "Three", "{}"),
    ]
    assert found[1].place == f"{tmp_path}/b/two.txt"
    assert documents(tmp_path / "b" / "two.txt")[0].document_id == "two.txt"


def test_files_are_grouped_into_units_of_about_unit_bytes_and_hashed(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * 10)
    plan = plan_units(str(tmp_path), 20)
    assert [len(unit.paths) for unit in plan.units] == [2, 2, 1]
    assert [unit.number for unit in plan.units] == [0, 1, 2]
    assert plan.files[0].sha256 == hashlib.sha256(b"x" * 10).hexdigest()
    assert {file.size_bytes for file in plan.files} == {10}
    assert plan == plan_units(str(tmp_path), 20)


def test_a_folder_may_mix_every_format(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "A")
    write(tmp_path / "b.jsonl", doc("b1"), doc("b2"))
    write_parquet(tmp_path / "c.parquet", {"id": ["c"], "text": ["C"]})
    write(tmp_path / "d.json", {"data": [{"title": "D", "paragraphs": [{"context": "D", "qas": []}]}]})
    write(tmp_path / "e.TXT", "E")
    plan = plan_units(str(tmp_path), 1000)
    assert [unit.format for unit in plan.units] == ["jsonl", "parquet", "squad", "files"]
    assert sorted(item.document_id for item in documents(tmp_path)) == ["D/0", "a.txt", "b1", "b2", "c", "e.TXT"]


def test_hidden_files_are_ignored_and_unknown_ones_rejected(tmp_path: Path) -> None:
    for name in (".git/a.txt", ".DS_Store", "x/.hidden.md", "~$open.docx", "picture.png", "Makefile", "good.md"):
        write(tmp_path / name, "text")
    plan = plan_units(str(tmp_path), LIMIT)
    assert [Path(file.path).name for file in plan.files] == ["good.md"]
    assert [(Path(item.place).name, item.kind) for item in plan.rejects] == [
        ("Makefile", "file"),
        ("picture.png", "file"),
    ]
    assert "files of type '.png' are not read; accepted: " in plan.rejects[1].reason


def test_links_that_leave_the_folder_and_things_that_are_no_files_are_refused(tmp_path: Path) -> None:
    secret = write(tmp_path / "outside" / "secret.txt", "secret")
    inside = write(tmp_path / "corpus" / "sub" / "inside.txt", "inside")
    corpus = tmp_path / "corpus"
    (corpus / "leaves.txt").symlink_to(secret)
    (corpus / "leaving").symlink_to(secret.parent)
    (corpus / "stays.txt").symlink_to(inside)
    (corpus / "staying").symlink_to(inside.parent)
    (corpus / "loop.txt").symlink_to(corpus / "loop.txt")
    os.mkfifo(corpus / "pipe.txt")
    rejects = plan_units(str(corpus), LIMIT).rejects
    assert [Path(item.place).name for item in rejects] == ["leaves.txt", "leaving", "loop.txt", "pipe.txt"]
    assert "leaves the folder" in rejects[0].reason
    assert [item.document_id for item in documents(corpus)] == ["stays.txt", "sub/inside.txt"]
    (tmp_path / "link").symlink_to(corpus)
    assert [item.document_id for item in documents(tmp_path / "link")] == ["stays.txt", "sub/inside.txt"]


def test_a_file_name_that_is_not_utf8_is_rejected_in_text_that_can_be_written(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.txt")).write_text("x")
    write(tmp_path / "good.txt", "x")
    (reject,) = plan_units(str(tmp_path), LIMIT).rejects
    assert "name is not UTF-8" in reject.reason
    assert reject.place.encode().endswith("bad\ufffd.txt".encode())


def test_odd_local_names_are_read_as_they_are(tmp_path: Path) -> None:
    names = ["a b#1?.txt", "c::d.txt", "[e]*.txt", "百.txt", "~x.txt"]
    for name in names:
        write(tmp_path / name, "x")
    assert sorted(item.document_id for item in documents(tmp_path)) == sorted(names)


def test_a_text_file_that_is_not_utf8_is_rejected_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 cr\xe8me")
    write(tmp_path / "good.txt", "x")
    reject = only_reject(read(tmp_path))
    assert (reject.place, reject.kind) == (f"{tmp_path}/bad.txt", "file")
    assert "not UTF-8" in reject.reason
    assert "iconv" in reject.reason


def test_empty_and_oversized_files_are_rejected(tmp_path: Path) -> None:
    write(tmp_path / "blank.txt", "  ")
    (tmp_path / "zero.txt").touch()
    (tmp_path / "zero.jsonl").touch()
    (tmp_path / "zero.parquet").touch()
    (tmp_path / "long.txt").write_bytes(b"x" * 101)
    (tmp_path / "fits.txt").write_bytes(b"x" * 100)
    plan = plan_units(str(tmp_path), LIMIT)
    assert [item.reason for item in plan.rejects] == ["the file is empty (0 bytes)"] * 3
    items = read(tmp_path, limit=100)
    assert [item.reason for item in items if isinstance(item, Reject)] == [
        "empty document",
        "file of 101 bytes is longer than max_document_bytes (100)",
    ]
    assert [item.document_id for item in items if isinstance(item, Document)] == ["fits.txt"]


def test_a_file_that_vanished_after_planning_is_rejected(tmp_path: Path) -> None:
    plan = plan_units(str(write(tmp_path / "a.txt", "x")), LIMIT)
    (tmp_path / "a.txt").unlink()
    assert "No such file" in only_reject(read_documents(plan.units[0], LIMIT)).reason


def test_an_input_with_nothing_readable_says_what_is_accepted(tmp_path: Path) -> None:
    for path, expected in (
        (tmp_path, "nothing readable"),
        (tmp_path / "missing", "no such file or folder"),
        (write(tmp_path / "x" / "a.csv", "a,b"), "'.csv' are not read"),
        (write(tmp_path / "y" / "a.json", {"a": 1}), "not SQuAD JSON"),
        ("nosuch://bucket/a", "Protocol not known"),
    ):
        with pytest.raises(InputError) as caught:
            plan_units(str(path), LIMIT)
        assert expected in str(caught.value)
        assert str(path) in str(caught.value)
        assert "SQuAD" in str(caught.value)


def test_a_missing_extra_stops_the_planning_and_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.pdf", "x")
    monkeypatch.setattr(readers.parsers, "missing_extra", lambda suffix: "pdf" if suffix == ".pdf" else None)
    with pytest.raises(InputError, match=r"a\.pdf.*pip install 'ragtune-ray\[pdf\]'"):
        plan_units(str(tmp_path), LIMIT)


# JSONL

LINES = st.one_of(
    st.builds(lambda text: json.dumps(doc("i", text)).encode(), st.text()),
    st.builds(
        lambda text: json.dumps(doc("i", text), ensure_ascii=False).encode(), st.text(st.characters(codec="utf-8"))
    ),
    st.sampled_from([b"", b"  ", b"{", b"\xff", b"[1]", b'{"_id": "i", "text": NaN}', b"\r", b"x" * 300]),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(LINES, max_size=12),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.integers(1, 300),
    st.integers(1, 64),
)
def test_any_cutting_of_jsonl_reads_the_same_rows_at_the_same_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes, ends: bool, unit_bytes: int, block: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(end.join(lines) + (end if ends else b"") or b"{}")
    with pytest.MonkeyPatch.context() as patch:
        whole = read(path, 10**9, limit=200)
        patch.setattr(readers, "_BLOCK_BYTES", block)
        plan = plan_units(str(path), unit_bytes)
        pieces = [item for unit in plan.units for item in read_documents(unit, 200)]
    assert pieces == whole
    starts = [unit.start for unit in plan.units]
    assert [0, *(unit.stop for unit in plan.units)] == [*starts, path.stat().st_size]
    data = path.read_bytes()
    assert [unit.first_line for unit in plan.units] == [data[:start].count(b"\n") + 1 for start in starts]
    assert all(unit.stop - unit.start >= unit_bytes for unit in plan.units[:-1])
    assert all(b"\n" not in data[unit.start + unit_bytes - 1 : unit.stop - 1] for unit in plan.units)
    numbers = [int(item.place.rpartition(":")[2]) for item in whole]
    assert numbers == [number for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def test_bad_lines_are_rejected_by_number_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    deep = b'{"_id": "deep", "text": ' + b"[" * 100_000
    bad = [b"{", b"\xff\xfe", b'{"_id": 1, "text": NaN}', b"[]", b'{"_id": 1, "body": "x"}', b'{"text": "x"}', deep]
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\n".join([json.dumps(doc(1)).encode(), *bad, b"", json.dumps(doc(2)).encode()])
    )
    items = read(path)
    assert [item.place for item in items] == [f"{path}:{number}" for number in (1, 2, 3, 4, 5, 6, 7, 8, 10)]
    reasons = [item.reason for item in items if isinstance(item, Reject)]
    expected = [
        "not JSON",
        "not UTF-8",
        "NaN",
        "must be a JSON object",
        "found _id, body",
        "no id",
        "nested too deeply",
    ]
    assert [text in reason for text, reason in zip(expected, reasons, strict=True)] == [True] * 7
    assert {item.kind for item in items if isinstance(item, Reject)} == {"row"}


def test_a_lone_surrogate_in_a_line_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"_id": "a\\ud800", "text": "b\\udc00\\ud83d\\ude00"}')
    (document,) = documents(path)
    assert (document.document_id, document.text) == ("a\ufffd", "b\ufffd😀")


def test_a_long_line_is_skipped_without_loading_it_and_its_size_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(doc(1)).encode() + b"\n")
        file.write(b"x" * 50_000_000 + b"\n")
        file.write(json.dumps(doc(2)).encode())
    tracemalloc.start()
    items = read(path, limit=1000)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert items[1] == Reject(f"{path}:2", "line of 50,000,000 bytes is longer than max_document_bytes (1,000)", "row")
    assert [item.document_id for item in items if isinstance(item, Document)] == ["1", "2"]
    assert peak_bytes < 25_000_000


def test_a_remote_file_whose_readline_takes_no_limit_is_read_like_a_local_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", doc(1), "x" * 500, doc(2), "{", doc(3))
    data, expected = path.read_bytes(), [read(path, size, limit=100) for size in (1, 200, 10**6)]

    class RemoteFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
        def _fetch_range(self, start: int, end: int) -> bytes:
            return data[start:end]

    monkeypatch.setattr(readers, "_open", lambda _: RemoteFile(None, "a", size=len(data), block_size=64))
    assert [read(path, size, limit=100) for size in (1, 200, 10**6)] == expected
    assert [type(item) for item in expected[0]] == [Document, Reject, Document, Reject, Document]


# Parquet


def test_a_parquet_file_whose_column_name_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"id": ["a"], "text": ["x"], "kind_of": ["x"]})
    path.write_bytes(path.read_bytes().replace(b"kind_of", b"kind\xff\xffo"))
    with pytest.raises(InputError, match=r"Parquet is broken"):
        plan_units(str(path), LIMIT)


@pytest.mark.parametrize("unit_bytes", [1, 300, 2000, 10**9])
def test_parquet_is_cut_by_row_groups_and_inside_large_ones(tmp_path: Path, unit_bytes: int) -> None:
    texts = [f"text {number}" for number in range(100)]
    path = write_parquet(
        tmp_path / "a.parquet", {"id": range(100), "text": texts, "year": [1] * 100}, row_group_size=30
    )
    plan = plan_units(str(path), unit_bytes)
    assert (len(plan.units) == 1) == (unit_bytes == 10**9)
    assert (len(plan.units) > 4) == (unit_bytes < 2000)
    found = documents(path, unit_bytes)
    assert [item.text for item in found] == texts
    assert [item.place for item in found] == [f"{path}#{number}" for number in range(100)]
    assert found[7].metadata == '{"year": 1}'


def test_parquet_reads_objects_categories_and_leaves_other_types_out(tmp_path: Path) -> None:
    columns = {
        "id": pa.array(["a"]),
        "text": pa.array(["x"]).dictionary_encode(),
        "metadata": pa.array([{"deep": {"n": [1]}}]),
        "vector": pa.array([[1.0]]),
        "when": pa.array([0], pa.timestamp("s")),
        "score": pa.array([float("nan")]),
        "large": pa.array(["y"], pa.large_string()),
    }
    (document,) = documents(write_parquet(tmp_path / "a.parquet", columns))
    assert document.metadata == '{"deep": {"n": [1]}, "large": "y"}'


def test_bad_rows_of_parquet_are_rejected_one_by_one(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"\xff", b" "], pa.binary()).buffers())
    path = write_parquet(tmp_path / "a.parquet", {"id": ["a", "b", "c"], "text": bad})
    items = read(path)
    assert isinstance(items[0], Document)
    assert [(item.place, item.kind) for item in items[1:] if isinstance(item, Reject)] == [
        (f"{path}#1", "row"),
        (f"{path}#2", "row"),
    ]


class Opaque(pa.ExtensionType):  # type: ignore[misc]  # pyarrow has no types
    def __init__(self) -> None:
        super().__init__(pa.string(), "test.opaque")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""


def test_broken_or_unfit_parquet_files_are_one_file_reject_each_found_at_planning(tmp_path: Path) -> None:
    write(tmp_path / "good.txt", "x")
    whole = write_parquet(tmp_path / "0.parquet", {"id": ["a"] * 100, "text": ["x"] * 100}).read_bytes()
    (tmp_path / "0.parquet").unlink()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.parquet").write_bytes(b"garbage" * 100)
    write_parquet(tmp_path / "c.parquet", {"id": ["a"], "body": ["x"]})
    write_parquet(tmp_path / "d.parquet", {"text": ["x"], "title": ["x"]})
    write_parquet(tmp_path / "e.parquet", {"id": ["a"], "text": ["x"], "blob": [[b"x"]]})
    opaque = pa.ExtensionArray.from_storage(Opaque(), pa.array(["x"]))
    write_parquet(tmp_path / "f.parquet", {"id": ["a"], "text": ["x"], "code": opaque})
    write_parquet(tmp_path / "g.parquet", {"id": ["a"], "text": [1]})
    write_parquet(tmp_path / "h.parquet", {"id": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    rejects = plan_units(str(tmp_path), LIMIT).rejects
    assert [Path(item.place).stem for item in rejects] == list("abcdefgh")
    assert {item.kind for item in rejects} == {"file"}
    expected = [
        "Parquet is broken",
        "Parquet is broken",
        "no column 'text'; found id, body",
        "no column 'document_id' or '_id' or 'id'; found text, title",
        "column 'blob' is of type",
        "column 'code' is of type",
        "column 'text' must be text, found int64",
        "holds no documents",
    ]
    assert [text for text, item in zip(expected, rejects, strict=True) if text not in item.reason] == []


def test_parquet_that_breaks_after_planning_is_one_file_reject(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"id": ["a"] * 1000, "text": ["x y z"] * 1000})
    plan = plan_units(str(path), LIMIT)
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    reject = only_reject(read_documents(plan.units[0], LIMIT))
    assert (reject.place, reject.kind) == (str(path), "file")
    assert "Parquet is broken" in reject.reason


# SQuAD and BEIR


def squad(*questions: dict[str, Any]) -> dict[str, Any]:
    other = {"context": "Other.", "qas": [{"id": "z", "question": "Z?", "answers": []}]}
    return {
        "version": "v2.0",
        "data": [
            {"title": "The_Moon", "paragraphs": [{"context": "Moon.", "qas": questions}, other, {"context": "Moon."}]}
        ],
    }


def test_squad_contexts_become_documents_and_their_questions_point_to_them(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write(
        path,
        squad(
            {"id": 1, "question": "A?", "answers": [{"text": "x"}, {"text": "y"}, {"text": "x"}]},
            {"id": "2", "question": "B?", "is_impossible": True, "plausible_answers": [{"text": "p"}]},
            {"id": "3", "question": "C?"},
            {"question": "no id"},
        ),
    )
    assert [(item.document_id, item.title, item.text, item.place) for item in documents(path, unit_bytes=1)] == [
        ("The_Moon/0", "The Moon", "Moon.", f"{path}#0"),
        ("The_Moon/1", "The Moon", "Other.", f"{path}#1"),
    ]
    assert len(plan_units(str(path), 1).units) == 3
    found = queries(path)
    assert [(item.query_id, item.answers) for item in found] == [("1", ("x", "y")), ("2", ()), ("3", None), ("z", ())]
    assert [item.document_ids for item in found] == [("The_Moon/0",)] * 3 + [("The_Moon/1",)]
    assert only_reject(read_queries(str(path))).place == f"{path}#3"


def test_bad_contexts_are_rejected_by_ordinal(tmp_path: Path) -> None:
    data = {"data": [{"title": "T", "paragraphs": [{"context": " "}, {"context": 5}, "x", {"context": "ok"}]}]}
    items = read(write(tmp_path / "a.json", data))
    assert [item.place.rpartition("#")[2] for item in items] == ["0", "1", "2", "3"]
    assert [type(item) for item in items] == [Reject, Reject, Reject, Document]


@pytest.mark.parametrize(
    ("name", "num_documents", "num_queries", "num_unanswerable"),
    [("squad/squad-v1.1-24articles.json", 1095, 5322, 0), ("squad/squad-v2.0-articles.json", 501, 5048, 2497)],
)
def test_real_squad_files_are_read_whole(
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


def beir(root: Path) -> Path:
    write(root / "corpus.jsonl", {"_id": "d1", "title": "T", "text": "x", "metadata": {"u": 1}}, doc("d2"))
    write(root / "queries.jsonl", *({"_id": f"q{number}", "text": f"Q{number}?"} for number in range(4)))
    header = "query-id\tcorpus-id\tscore"
    write(root / "qrels" / "train.tsv", header, "q0\td1\t1")
    write(root / "qrels" / "dev.tsv", header, "q1\td1\t2", "q1\td2\t0", "q0\td2\t1", "q1\td1\t1")
    write(root / "qrels" / "test.tsv", header, "q2\td2\t1", "broken", "q2\td1\tnan", "gone\td1\t1")
    return root


def test_beir_reads_the_corpus_alone_and_queries_by_their_qrels(tmp_path: Path) -> None:
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


def test_beir_without_the_asked_qrels_says_which_there_are(tmp_path: Path) -> None:
    (beir(tmp_path) / "qrels" / "test.tsv").unlink()
    with pytest.raises(InputError, match=r"'test'; qrels/ holds: dev, train"):
        read_queries(str(tmp_path), "test")
    (tmp_path / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"hold queries\.jsonl"):
        read_queries(str(tmp_path))


# Queries


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


def test_a_repeated_query_id_is_dropped_and_one_with_two_texts_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", doc("a", "One?"), doc("b", "Two?"), doc("a", "One?"))
    assert [item.query_id for item in queries(path)] == ["a", "b"]
    assert only_reject(read_queries(str(path))) == Reject(
        f"{path}:3", f"query id 'a' stands already at {path}:1", "row"
    )
    write(path, doc("a", "One?"), doc("a", "Other?"))
    with pytest.raises(InputError, match=r"'a' has two texts, at .*q\.jsonl:1 and .*q\.jsonl:2"):
        queries(path)


def test_a_file_of_queries_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
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
        ("c.parquet", "no column 'text' or 'query' or 'question'; found id, body"),
    ):
        with pytest.raises(InputError) as caught:
            queries(tmp_path / name)
        assert expected in str(caught.value)
        assert name in str(caught.value)


# Other filesystems


def test_a_remote_filesystem_reads_like_a_local_one(tmp_path: Path) -> None:
    write(tmp_path / "a.md", "# A")
    write(tmp_path / "b" / "b.jsonl", *(doc(number) for number in range(50)))
    write(tmp_path / "b" / ".git" / "c.txt", "hidden")
    write_parquet(tmp_path / "d.parquet", {"id": [str(number) for number in range(50)], "text": ["x"] * 50})
    write(tmp_path / "e.json", squad())
    write(tmp_path / "f.png", "x")
    beir(tmp_path / "beir")
    root = "memory://readers-test"
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(tmp_path) + "/", "/readers-test/", recursive=True)
    try:
        local, remote = plan_units(str(tmp_path), 200), plan_units(root + "/", 200)
        assert [file.sha256 for file in remote.files] == [file.sha256 for file in local.files]
        assert remote.rejects[-1].place == f"{root}/f.png"
        assert len(remote.rejects) == len(local.rejects) == 4

        def moved(items: list[Any]) -> str:
            return repr(items).replace(root, str(tmp_path))

        assert moved([*remote.units]) == repr([*local.units])
        assert moved(read(root, 200)) == repr(read(tmp_path, 200))
        assert moved([*read_queries(f"{root}/beir")]) == repr([*read_queries(str(tmp_path / "beir"))])
        with pytest.raises(InputError, match="no such file"):
            plan_units(f"{root}/missing.jsonl", 200)
    finally:
        filesystem.rm("/readers-test", recursive=True)
