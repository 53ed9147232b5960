"""An input is divided into units that cover it once; unusable files become rejects."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragtune_ray.config import Corpus
from ragtune_ray.config.extras import install_command
from ragtune_ray.ingest import inputs
from ragtune_ray.ingest.input_units import plan_units
from ragtune_ray.ingest.inputs import InputError
from ragtune_ray.ingest.readers import read_documents
from tests.support.corpora import doc, documents, read, write, write_parquet

LIMIT = 1_000_000


def test_files_are_hashed_and_grouped_by_unit_bytes(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * 10)
    plan = plan_units(str(tmp_path), 20)
    assert [len(unit.paths) for unit in plan.units] == [2, 2, 1]
    assert [unit.number for unit in plan.units] == [0, 1, 2]
    assert plan.files[0].sha256 == hashlib.sha256(b"x" * 10).hexdigest()
    assert {file.size_bytes for file in plan.files} == {10}
    assert plan == plan_units(str(tmp_path), 20)


def test_folder_may_mix_all_formats(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "A")
    write(tmp_path / "b.jsonl", doc("b1"), doc("b2"))
    write_parquet(tmp_path / "c.parquet", {"id": ["c"], "text": ["C"]})
    write(tmp_path / "d.json", {"data": [{"title": "D", "paragraphs": [{"context": "D", "qas": []}]}]})
    write(tmp_path / "e.TXT", "E")
    plan = plan_units(str(tmp_path), 1000)
    assert [unit.format for unit in plan.units] == ["jsonl", "parquet", "squad", "files"]
    assert sorted(item.document_id for item in documents(tmp_path)) == ["D/0", "a.txt", "b1", "b2", "c", "e.TXT"]


def test_hidden_files_are_ignored_and_unknown_types_rejected(tmp_path: Path) -> None:
    for name in (".git/a.txt", ".DS_Store", "x/.hidden.md", "~$open.docx", "picture.png", "Makefile", "good.md"):
        write(tmp_path / name, "text")
    plan = plan_units(str(tmp_path), LIMIT)
    assert [Path(file.path).name for file in plan.files] == ["good.md"]
    assert [(Path(item.place).name, item.kind) for item in plan.rejects] == [
        ("Makefile", "file"),
        ("picture.png", "file"),
    ]
    assert "files of type '.png' cannot be read; accepted: " in plan.rejects[1].reason


def test_links_leaving_the_folder_and_special_files_are_rejected(tmp_path: Path) -> None:
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


def test_file_name_that_is_not_utf8_is_rejected_in_valid_text(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.txt")).write_text("x")
    write(tmp_path / "good.txt", "x")
    (reject,) = plan_units(str(tmp_path), LIMIT).rejects
    assert "name is not UTF-8" in reject.reason
    assert reject.place.encode().endswith("bad\ufffd.txt".encode())


def test_input_with_nothing_readable_lists_accepted_formats(tmp_path: Path) -> None:
    for path, expected in (
        (tmp_path, "nothing readable"),
        (tmp_path / "missing", "no such file or folder"),
        (write(tmp_path / "x" / "a.zip", "a,b"), "'.zip' cannot be read"),
        (write(tmp_path / "y" / "a.json", {"a": 1}), "not SQuAD JSON"),
        ("nosuch://bucket/a", "Protocol not known"),
    ):
        with pytest.raises(InputError) as caught:
            plan_units(str(path), LIMIT)
        assert expected in str(caught.value)
        assert str(path) in str(caught.value)
        assert "SQuAD" in str(caught.value)


def test_all_missing_libraries_are_named_at_once_before_a_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.pdf", "b.PDF", "c.md", "d.docx"):
        write(tmp_path / name, "x")
    monkeypatch.setattr(inputs.parsers, "missing_extra", {".pdf": "pdf", ".docx": "docx"}.get)
    monkeypatch.setattr(inputs, "open_file", lambda path: pytest.fail(f"{path} was opened"))
    with pytest.raises(InputError) as error:
        plan_units(str(tmp_path), LIMIT)
    expected = f"{tmp_path}: libraries that read 1 .docx, 2 .pdf are missing; run: {install_command('docx', 'pdf')}"
    assert str(error.value) == expected


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
def test_any_division_of_jsonl_reads_the_same_rows_and_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes, ends: bool, unit_bytes: int, block: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(end.join(lines) + (end if ends else b"") or b"{}")
    with pytest.MonkeyPatch.context() as patch:
        whole = read(path, 10**9, limit=200)
        patch.setattr(inputs, "BLOCK_BYTES", block)
        plan = plan_units(str(path), unit_bytes)
        pieces = [item for unit in plan.units for item in read_documents(unit, Corpus(max_document_bytes=200))]
    assert pieces == whole
    starts = [unit.start for unit in plan.units]
    assert [0, *(unit.stop for unit in plan.units)] == [*starts, path.stat().st_size]
    data = path.read_bytes()
    assert [unit.first_line for unit in plan.units] == [data[:start].count(b"\n") + 1 for start in starts]
    assert all(unit.stop - unit.start >= unit_bytes for unit in plan.units[:-1])
    assert all(b"\n" not in data[unit.start + unit_bytes - 1 : unit.stop - 1] for unit in plan.units)
    numbers = [int(item.place.rpartition(":")[2]) for item in whole]
    assert numbers == [number for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]


@pytest.mark.parametrize("unit_bytes", [1, 300, 2000, 10**9])
def test_parquet_is_divided_by_row_groups_and_inside_large_ones(tmp_path: Path, unit_bytes: int) -> None:
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
