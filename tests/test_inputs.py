"""Files are found and opened wherever they are, and their lines come with their places."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.spec import AbstractBufferedFile

from ragtune_ray import inputs
from ragtune_ray.inputs import InputError
from ragtune_ray.planning import plan_units
from ragtune_ray.queries import read_queries
from ragtune_ray.readers import read_documents
from ragtune_ray.schema import Document, Reject

LIMIT = 1_000_000


def read(path: Any, unit_bytes: int = LIMIT, limit: int = LIMIT) -> list[Document | Reject]:
    return [item for unit in plan_units(str(path), unit_bytes).units for item in read_documents(unit, limit)]


def documents(path: Any, unit_bytes: int = LIMIT) -> list[Document]:
    items = read(path, unit_bytes)
    assert not [item for item in items if isinstance(item, Reject)]
    return [item for item in items if isinstance(item, Document)]


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, Any], row_group_size: int = 1_000_000) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def doc(identifier: Any, text: str = "Mars.") -> dict[str, Any]:
    return {"_id": identifier, "text": text}


def test_odd_local_names_are_read_as_they_are(tmp_path: Path) -> None:
    names = ["a b#1?.txt", "c::d.txt", "[e]*.txt", "百.txt", "~x.txt"]
    for name in names:
        write(tmp_path / name, "x")
    assert sorted(item.document_id for item in documents(tmp_path)) == sorted(names)


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

    monkeypatch.setattr(inputs, "open_file", lambda _: RemoteFile(None, "a", size=len(data), block_size=64))
    assert [read(path, size, limit=100) for size in (1, 200, 10**6)] == expected
    assert [type(item) for item in expected[0]] == [Document, Reject, Document, Reject, Document]


def squad(*questions: dict[str, Any]) -> dict[str, Any]:
    other = {"context": "Other.", "qas": [{"id": "z", "question": "Z?", "answers": []}]}
    return {
        "version": "v2.0",
        "data": [
            {"title": "The_Moon", "paragraphs": [{"context": "Moon.", "qas": questions}, other, {"context": "Moon."}]}
        ],
    }


def beir(root: Path) -> Path:
    write(root / "corpus.jsonl", {"_id": "d1", "title": "T", "text": "x", "metadata": {"u": 1}}, doc("d2"))
    write(root / "queries.jsonl", *({"_id": f"q{number}", "text": f"Q{number}?"} for number in range(4)))
    header = "query-id\tcorpus-id\tscore"
    write(root / "qrels" / "train.tsv", header, "q0\td1\t1")
    write(root / "qrels" / "dev.tsv", header, "q1\td1\t2", "q1\td2\t0", "q0\td2\t1", "q1\td1\t1")
    write(root / "qrels" / "test.tsv", header, "q2\td2\t1", "broken", "q2\td1\tnan", "gone\td1\t1")
    return root


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
