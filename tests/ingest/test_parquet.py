"""Rows of Parquet are read one by one; broken files, bad rows and unsafe types become rejects."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from ragtune_ray.config import Corpus
from ragtune_ray.ingest.input_units import plan_units
from ragtune_ray.ingest.inputs import InputError
from ragtune_ray.ingest.readers import read_documents
from ragtune_ray.schema import Document, Reject
from tests.support.corpora import documents, only_reject, read, write, write_parquet

LIMIT = 1_000_000


def test_column_name_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"id": ["a"], "text": ["x"], "kind_of": ["x"]})
    path.write_bytes(path.read_bytes().replace(b"kind_of", b"kind\xff\xffo"))
    with pytest.raises(InputError, match=r"Parquet is broken"):
        plan_units(str(path), LIMIT)


def test_objects_and_categories_are_read_and_other_types_ignored(tmp_path: Path) -> None:
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


def test_bad_rows_are_rejected_one_by_one(tmp_path: Path) -> None:
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


def test_broken_or_unsuitable_files_are_rejected_when_planning(tmp_path: Path) -> None:
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
        "contains no documents",
    ]
    assert [text for text, item in zip(expected, rejects, strict=True) if text not in item.reason] == []


def test_file_with_broken_pages_is_one_reject(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"id": ["a"] * 1000, "text": ["x y z"] * 1000})
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    plan = plan_units(str(path), LIMIT)
    reject = only_reject(read_documents(plan.units[0], Corpus(max_document_bytes=LIMIT)))
    assert (reject.place, reject.kind) == (str(path), "file")
    assert "Parquet is broken" in reject.reason
