"""Rows of Parquet are read one by one; broken files, bad rows and unsafe types become rejects."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragtune_ray.config import Corpus
from ragtune_ray.index import filters
from ragtune_ray.ingest.input_units import plan_units
from ragtune_ray.ingest.parquet import unread_line
from ragtune_ray.ingest.readers import UnitRead, read_documents
from ragtune_ray.schema import Document, Reject
from tests.support.corpora import documents, only_reject, read, write, write_parquet

LIMIT = 1_000_000


def test_column_name_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"id": ["a"], "text": ["x"], "kind_of": ["x"]})
    path.write_bytes(path.read_bytes().replace(b"kind_of", b"kind\xff\xffo"))
    assert "Parquet is broken" in only_reject(read(path)).reason


def test_dates_decimals_lists_and_objects_become_metadata(tmp_path: Path) -> None:
    metadata = pa.struct(
        {
            "tenant": pa.string(),
            "day": pa.date32(),
            "price": pa.decimal128(8, 2),
            "whole": pa.decimal128(8, 2),
            "tags": pa.list_(pa.string()),
            "days": pa.list_(pa.date32()),
            "labels": pa.map_(pa.string(), pa.int64()),
            "scan": pa.binary(),
            "deep": pa.struct({"n": pa.int8(), "raw": pa.list_(pa.binary())}),
        }
    )
    day = dt.date(2024, 2, 29)
    row = {"tenant": "acme", "day": day, "price": Decimal("9.50"), "whole": Decimal("3.00"), "tags": ["a", "b"]}
    row |= {"days": [day], "labels": [("x", 1)], "scan": b"\0", "deep": {"n": 1, "raw": [b""]}}
    when = dt.datetime(2024, 2, 29, 12, 30, tzinfo=dt.UTC)
    columns = {
        "id": ["a"],
        "text": ["x"],
        "metadata": pa.array([row], metadata),
        "when": pa.array([when], pa.timestamp("ns", "UTC")),
        "at": pa.array([when.time()], pa.time64("ns")),
        "cost": pa.array([Decimal("0.10")], pa.decimal256(40, 2)),
        "authors": [["Ann", "Bo"]],
        "vector": [[0.5] * 101],
        "object": [{"a": 1}],
        "image": [{"bytes": b"\x89PNG", "path": "a.png"}],
        "span": pa.array([5], pa.duration("s")),
        "tensor": pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2)),
    }
    path = write_parquet(tmp_path / "a.parquet", columns)
    (document,) = documents(path)
    assert json.loads(document.metadata) == {
        "tenant": "acme",
        "day": "2024-02-29",
        "price": 9.5,
        "whole": 3,
        "tags": ["a", "b"],
        "days": ["2024-02-29"],
        "labels": {"x": 1},
        "deep": {"n": 1},
        "when": "2024-02-29T12:30:00+00:00",
        "at": "12:30:00",
        "cost": 0.1,
        "authors": ["Ann", "Bo"],
    }
    table = filters.attributes([document.metadata])
    for condition in (
        {"days": "2024-02-29"},
        {"authors": "Bo"},
        {"when": {"gte": "2024-02-28"}},
        {"price": {"lt": 10}},
    ):
        assert filters.matches(filters.parse_filter(condition), table, lambda: [document.metadata]).tolist() == [True]
    found = [UnitRead() for _ in range(3)]
    for unit, part in zip(plan_units(str(path), path.stat().st_size // 3 + 1).units, found, strict=True):
        list(read_documents(unit, Corpus(), part))
    line = unread_line(part.unread for part in found)
    assert line.startswith("left unread in 1 Parquet file: metadata.scan (binary), metadata.deep.raw (list<")
    assert [name for name in columns if f" {name} (" in line] == ["object", "image", "span", "tensor"]


def test_binary_columns_are_left_unread_and_binary_ids_refused(tmp_path: Path) -> None:
    good = write_parquet(tmp_path / "a.parquet", {"id": ["a"], "text": ["x"], "blob": [b"x"], "year": [1]})
    (document,) = documents(good)
    assert document.metadata == '{"year": 1}'
    bad = write_parquet(tmp_path / "b.parquet", {"id": [b"a"], "text": ["x"]})
    assert only_reject(read(bad)).reason == "column 'id' must be text or integers, found binary"


def test_a_value_that_python_cannot_hold_is_one_rejected_row(tmp_path: Path) -> None:
    days = pa.array([0, 10**7], pa.int32()).cast(pa.date32())
    items = read(write_parquet(tmp_path / "a.parquet", {"id": ["a", "b"], "text": ["x", "y"], "day": days}))
    assert isinstance(items[0], Document)
    assert items[0].metadata == '{"day": "1970-01-01"}'
    assert "a value cannot be read" in only_reject(items).reason


def test_objects_and_categories_are_read_and_other_types_ignored(tmp_path: Path) -> None:
    columns = {
        "id": pa.array(["a"]),
        "text": pa.array(["x"]).dictionary_encode(),
        "metadata": pa.array([{"deep": {"n": [1]}}]),
        "vector": pa.array([[1.0] * 101]),
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


@pytest.mark.parametrize("unit_bytes", [100, LIMIT])
def test_broken_or_unsuitable_files_are_one_reject_each_however_they_are_cut(tmp_path: Path, unit_bytes: int) -> None:
    write(tmp_path / "good.txt", "x")
    whole = write_parquet(tmp_path / "0.parquet", {"id": ["a"] * 100, "text": ["x"] * 100}).read_bytes()
    (tmp_path / "0.parquet").unlink()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.parquet").write_bytes(b"garbage" * 100)
    write_parquet(tmp_path / "c.parquet", {"id": ["a"], "body": ["x"]})
    write_parquet(tmp_path / "d.parquet", {"text": ["x"], "title": ["x"]})
    opaque = pa.ExtensionArray.from_storage(Opaque(), pa.array(["x"]))
    write_parquet(tmp_path / "e.parquet", {"id": ["a"], "text": opaque})
    write_parquet(tmp_path / "f.parquet", {"id": opaque, "text": ["x"]})
    write_parquet(tmp_path / "g.parquet", {"id": ["a"], "text": [1]})
    write_parquet(tmp_path / "h.parquet", {"id": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    rejects = [item for item in read(tmp_path, unit_bytes) if isinstance(item, Reject)]
    assert [Path(item.place).stem for item in rejects] == list("abcdefgh")
    assert {item.kind for item in rejects} == {"file"}
    expected = [
        "Parquet is broken",
        "Parquet is broken",
        "no column 'text'; found id, body",
        "no column 'document_id' or '_id' or 'id'; found text, title",
        "column 'text' must be text, found",
        "column 'id' must be text or integers, found",
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


def test_a_flipped_bit_is_found_if_the_file_has_checksums_of_its_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["x y z", "u v w"]}), path, write_page_checksum=True)
    text = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    data[(text.dictionary_page_offset or text.data_page_offset) + text.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    plan = plan_units(str(path), LIMIT)
    reject = only_reject(read_documents(plan.units[0], Corpus(max_document_bytes=LIMIT)))
    assert (reject.place, reject.kind) == (str(path), "file")
    assert "Parquet is broken" in reject.reason
