"""Units become documents; unreadable files and rows become rejects."""

from __future__ import annotations

import json
from pathlib import Path

from ragtune_ray.ingest.input_units import plan_units
from ragtune_ray.schema import Document, Reject
from tests.support.corpora import doc, documents, only_reject, read, write

LIMIT = 1_000_000


def test_each_file_of_a_folder_is_a_document_with_its_path_as_id(tmp_path: Path) -> None:
    write(tmp_path / "b" / "two.txt", "Two")
    write(tmp_path / "a.md", "# One")
    write(tmp_path / "c.html", "<p>Three</p>")
    found = documents(tmp_path)
    assert [(item.document_id, item.title, item.text, item.metadata) for item in found] == [
        ("a.md", "One", "# One\n", '{"path": "a.md"}'),
        ("b/two.txt", "two", "Two\n", '{"folder": ["b"], "path": "b/two.txt"}'),
        ("c.html", "c", "Three", '{"path": "c.html"}'),
    ]
    assert found[1].place == f"{tmp_path}/b/two.txt"
    assert documents(tmp_path / "b" / "two.txt")[0].document_id == "two.txt"


def test_file_that_is_not_utf8_is_rejected_with_a_fix(tmp_path: Path) -> None:
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


def test_bad_lines_are_rejected_by_number_and_others_read(tmp_path: Path) -> None:
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


def test_lone_surrogate_in_a_line_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"_id": "a\\ud800", "text": "b\\udc00\\ud83d\\ude00"}')
    (document,) = documents(path)
    assert (document.document_id, document.text) == ("a\ufffd", "b\ufffd😀")


def test_bad_contexts_are_rejected_by_ordinal(tmp_path: Path) -> None:
    data = {"data": [{"title": "T", "paragraphs": [{"context": " "}, {"context": 5}, "x", {"context": "ok"}]}]}
    items = read(write(tmp_path / "a.json", data))
    assert [item.place.rpartition("#")[2] for item in items] == ["0", "1", "2", "3"]
    assert [type(item) for item in items] == [Reject, Reject, Reject, Document]
