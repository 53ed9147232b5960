"""An input is divided into units that cover it once; unusable files become rejects."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragtune_ray.config import Corpus
from ragtune_ray.config.extras import install_command
from ragtune_ray.ingest import input_units, inputs
from ragtune_ray.ingest.input_units import Unit, plan_units, usual_unit_bytes
from ragtune_ray.ingest.inputs import InputError
from ragtune_ray.ingest.readers import num_rows, read_documents
from tests.support.corpora import doc, documents, only_reject, read, read_plan, write, write_parquet

LIMIT = 1_000_000


def test_files_are_grouped_by_unit_bytes_and_number_without_being_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * 10)
    hashed = plan_units(str(tmp_path), 20, fingerprint="sha256")
    assert {file.identity for file in hashed.files} == {hashlib.sha256(b"x" * 10).hexdigest()}
    monkeypatch.setattr(inputs, "open_file", lambda path: pytest.fail(f"{path} was opened"))
    plan = plan_units(str(tmp_path), 20)
    assert [len(unit.paths) for unit in plan.units] == [2, 2, 1]
    assert [unit.number for unit in plan.units] == [0, 1, 2]
    status = (tmp_path / "0.txt").stat()
    assert plan.files[0].identity == f"a-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"
    assert ({file.size_bytes for file in plan.files}, plan.size_bytes) == ({10}, 50)
    assert list(plan.units) == list(plan_units(str(tmp_path), 20).units) != list(hashed.units)
    monkeypatch.setattr(input_units, "MAX_FILES", 3)
    assert [len(unit.paths) for unit in plan_units(str(tmp_path), 10**9).units] == [3, 2]


def test_a_unit_survives_json_and_its_key_leaves_out_the_number(tmp_path: Path) -> None:
    write(tmp_path / "a.md", "a")
    write(tmp_path / "a.md.meta.json", {"owner": "acme"})
    write(tmp_path / "b.jsonl", *map(doc, range(50)))
    for mode in ("listing", "sha256"):
        units = plan_units(str(tmp_path), 300, fingerprint=mode).units
        assert [Unit.from_json(json.loads(json.dumps(asdict(unit)))) for unit in units] == list(units)
        assert len({unit.key for unit in units}) == len(units) > 3
        assert [replace(unit, number=7).key for unit in units] == [unit.key for unit in units]
        assert replace(units[0], stop=1).key != units[0].key
        assert replace(units[0], root="/").key != units[0].key


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


def test_a_link_to_a_hidden_folder_is_a_reject(tmp_path: Path) -> None:
    """As Kubernetes mounts a ConfigMap: what its links name is in a hidden folder."""
    write(tmp_path / "..2024" / "top.md", "top")
    write(tmp_path / "..2024" / "sub" / "in.md", "inner")
    (tmp_path / "..data").symlink_to("..2024")
    (tmp_path / "top.md").symlink_to("..data/top.md")
    (tmp_path / "sub").symlink_to("..data/sub")
    plan = plan_units(str(tmp_path), LIMIT)
    assert [Path(file.path).name for file in plan.files] == ["top.md"]
    assert [(Path(item.place).name, "hidden folder" in item.reason) for item in plan.rejects] == [("sub", True)]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_folder_that_a_disk_cannot_list_is_no_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write(tmp_path / "a.txt", "x")
    write(tmp_path / "sub" / "b.txt", "x")
    scan = os.scandir

    def failing(path: str) -> Any:
        if str(path).rstrip("/").endswith("sub"):
            raise OSError(number, os.strerror(number), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", failing)
    if number == errno.EIO:
        with pytest.raises(InputError, match=r"sub/: cannot be listed .*would count as deleted"):
            plan_units(str(tmp_path), LIMIT)
    else:
        (item,) = plan_units(str(tmp_path), LIMIT).rejects
        assert item.is_transient


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
        (write(tmp_path / "y" / "a.json").parent, "a.json: the file is empty (0 bytes)"),
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
        pieces = read_plan(plan, 200)
    assert pieces == whole
    starts = [unit.start for unit in plan.units]
    assert [0, *(unit.stop for unit in plan.units)] == [*starts, path.stat().st_size]
    assert all(0 < unit.stop - unit.start <= unit_bytes for unit in plan.units)
    data = path.read_bytes()
    numbers = [int(item.place.rpartition(":")[2]) for item in whole]
    assert numbers == [number for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([b"", b" ", b"{}", b"[1]", b"\xff", b"x" * 40]), max_size=9), st.data())
def test_each_line_belongs_to_the_one_unit_in_which_it_begins(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], data: st.DataObject
) -> None:
    """Against a plain split at line ends, for any cuts: also where a line is longer than several units."""
    content = b"\xef\xbb\xbf" + data.draw(st.sampled_from([b"\n", b"\r\n"])).join([b"{}", *lines])
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(content)
    cuts = sorted({0, *data.draw(st.lists(st.integers(0, len(content)))), len(content)})
    edges = [match.end() for match in re.finditer(rb"\n", content)]
    starts = [start for start in (0, *edges) if start < len(content)]
    before = 0
    for start, stop in itertools.pairwise(cuts):
        found = inputs.LinesRead()
        rows = list(inputs.read_lines(str(path), 100, start, stop, found))
        own = [first for first in starts if start <= first < stop]
        whole = [content[first:].partition(b"\n")[0] + b"\n" for first in own]
        kept = [(number, line) for number, line in enumerate(whole, before + 1) if line.strip()]
        read = [(inputs.resolve_place(place, before), line.rstrip(b"\n") + b"\n") for place, line in rows]
        assert read == [(f"{path}:{number}", line) for number, line in kept]
        assert found.num_lines == len(own)
        end = content.find(b"\n", own[-1]) + 1 or len(content) if own else 0
        assert found.digest.hexdigest() == hashlib.sha256(content[own[0] : end] if own else b"").hexdigest()
        before += len(own)
    assert before == len(starts)


def test_lines_are_numbered_from_the_start_of_each_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", *(doc(f"{name}{number}") for number in range(9)))
    expected = [f"{tmp_path}/{name}.jsonl:{line}" for name in "ab" for line in range(1, 10)]
    assert [item.place for item in documents(tmp_path, 70)] == expected


def test_a_byte_order_mark_at_the_start_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(json.dumps(doc(number)).encode() + b"\r\n" for number in range(9)))
    for unit_bytes in range(1, 60):
        assert [item.document_id for item in documents(path, unit_bytes)] == [*map(str, range(9))]


@pytest.mark.parametrize("group_rows", [7, 30, 100])
def test_each_row_group_belongs_to_one_unit(tmp_path: Path, group_rows: int) -> None:
    texts = [f"text {number}" for number in range(100)]
    path = write_parquet(
        tmp_path / "a.parquet", {"id": range(100), "text": texts, "year": [1] * 100}, row_group_size=group_rows
    )
    size = path.stat().st_size
    for unit_bytes in (50, *random.Random(0).sample(range(100, size + 1), 12), size, 10**9):
        plan = plan_units(str(path), unit_bytes)
        found = documents(path, unit_bytes)
        assert [item.text for item in found] == texts
        assert [item.place for item in found] == [f"{path}#{number}" for number in range(100)]
        assert found[7].metadata == '{"year": 1}'
        assert sum(map(num_rows, plan.units)) == 100
        assert {num_rows(unit) % group_rows for unit in plan.units} <= {0, 100 % group_rows}
        assert (len(plan.units) == 1) == (unit_bytes >= size)
        some = [item for unit in plan.units for item in read_documents(unit, Corpus(), rows=range(3, 5))]
        inner = [list(read_documents(unit, Corpus()))[3:5] for unit in plan.units]
        assert some == list(itertools.chain.from_iterable(inner))


def test_each_context_belongs_to_one_unit(tmp_path: Path) -> None:
    paragraphs = [{"context": f"text {number}", "qas": []} for number in range(37)]
    path = write(tmp_path / "a.json", {"data": [{"title": "T", "paragraphs": paragraphs}]})
    size = path.stat().st_size
    for unit_bytes in (17, *random.Random(0).sample(range(20, size + 1), 12), size, 10**9):
        units = plan_units(str(path), unit_bytes).units
        assert len(units) == -(-size // unit_bytes)
        parts = [[item.document_id for item in read_documents(unit, Corpus())] for unit in units]
        assert list(itertools.chain.from_iterable(parts)) == [f"T/{number}" for number in range(37)]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 + (len(parts[-1]) != len(parts[0]))
        assert list(map(num_rows, units)) == list(map(len, parts))


@pytest.mark.parametrize(("text", "reason"), [('{"a": 1}', "not SQuAD JSON"), ('{"data": []}', "no documents")])
def test_a_json_file_without_contexts_is_one_reject(tmp_path: Path, text: str, reason: str) -> None:
    path = write(tmp_path / "a.json", text)
    for unit_bytes in (2, 10**9):
        (item,) = read(path, unit_bytes)
        assert only_reject([item]).kind == "file"
        assert reason in only_reject([item]).reason


def test_the_usual_size_of_a_unit_depends_on_the_input_alone() -> None:
    for exponent in range(10, 44):
        for size in (2**exponent - 1, 2**exponent, 2**exponent + 1):
            found = usual_unit_bytes(size)
            assert found.bit_count() == 1
            assert 2**18 <= found <= 2**26
            assert found == 2**18 or size / found > 128, "not larger than needed"
            assert found == 2**26 or size / found <= 256
