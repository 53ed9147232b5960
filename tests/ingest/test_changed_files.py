"""A file that is not what it was in planning is never read as if it were."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragtune_ray.config import Corpus
from ragtune_ray.ingest import inputs, planned_file
from ragtune_ray.ingest.input_units import Plan, plan_units
from ragtune_ray.ingest.inputs import ChangedError
from ragtune_ray.ingest.readers import read_documents
from ragtune_ray.schema import Document
from tests.support.corpora import LIMIT, doc, squad, write, write_parquet

CORPUS = Corpus(max_document_bytes=LIMIT)


def text_file(folder: Path, text: str) -> Path:
    return write(folder / "a.txt", text)


def lines(folder: Path, text: str) -> Path:
    return write(folder / "a.jsonl", *(doc(number, f"{text} {number}") for number in range(40)))


def rows(folder: Path, text: str) -> Path:
    texts = [f"{text} {number}" for number in range(40)]
    return write_parquet(folder / "a.parquet", {"id": range(40), "text": texts}, row_group_size=10)


def contexts(folder: Path, text: str) -> Path:
    data = squad()
    data["data"][0]["paragraphs"] = [{"context": f"{text} {number}", "qas": []} for number in range(40)]
    return write(folder / "a.json", data)


def read_all(plan: Plan, limit: int = LIMIT) -> list[str]:
    found = [item for unit in plan.units for item in read_documents(unit, Corpus(max_document_bytes=limit))]
    return [item.text if isinstance(item, Document) else item.reason for item in found]


FORMATS = [text_file, lines, rows, contexts]


@pytest.mark.parametrize("make", FORMATS)
def test_a_replaced_file_is_an_error_until_it_is_back(tmp_path: Path, make: Callable[[Path, str], Path]) -> None:
    path = make(tmp_path, "Amber")
    original = path.read_bytes()
    plan = plan_units(str(path), 600)
    before = read_all(plan)
    make(tmp_path, "Basal")  # as long as before
    assert len(path.read_bytes()) == len(original)
    for unit in plan.units:
        with pytest.raises(ChangedError, match=rf"^{path} changed while it was indexed; run again$"):
            list(read_documents(unit, CORPUS))
    path.write_bytes(original)
    assert read_all(plan) == before


@pytest.mark.parametrize("make", FORMATS)
def test_a_deleted_or_shortened_file_is_an_error(tmp_path: Path, make: Callable[[Path, str], Path]) -> None:
    path = make(tmp_path, "Amber")
    unit = plan_units(str(path), 600).units[-1]
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(ChangedError):
        list(read_documents(unit, CORPUS))
    path.unlink()
    with pytest.raises(ChangedError):
        list(read_documents(unit, CORPUS))


def test_lines_are_compared_range_by_range(tmp_path: Path) -> None:
    path = lines(tmp_path, "Amber")
    plan = plan_units(str(path), 600)
    assert len(plan.units) > 2
    with path.open("r+b") as file:  # the last range changes, and a line is appended after it
        file.seek(-4, os.SEEK_END)
        file.write(b"X")
        file.seek(0, os.SEEK_END)
        file.write(json.dumps(doc("new")).encode())
    changed = []
    for unit in plan.units:
        try:
            list(read_documents(unit, CORPUS))
        except ChangedError:
            changed.append(unit.number)
    assert changed == [len(plan.units) - 1]


def test_appended_lines_are_not_read_and_no_change(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", doc("a"), doc("b"))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    plan = plan_units(str(path), 1000)
    with path.open("a") as file:
        file.write("more of the last line\n" + json.dumps(doc("c")))
    assert [item.document_id for item in read_documents(plan.units[0], CORPUS)] == ["a", "b"]
    assert (
        read_all(plan, 5)
        == [  # the last line is too long, and still ends where it ended in planning
            "line of 29 bytes is longer than max_document_bytes (5)"
        ]
        * 2
    )


def test_a_file_beyond_the_size_limit_is_compared_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x" * 100)
    plan = plan_units(str(path), 1000)
    assert "longer than max_document_bytes" in read_all(plan, 50)[0]
    path.write_text("x" * 99 + "y\n")
    with pytest.raises(ChangedError):
        read_all(plan, 50)


def noise(seed: int) -> pa.Table:
    """Rows whose text, which is read, stands between images, which are not."""
    source = np.random.default_rng(seed)
    words = ["".join(map(chr, source.integers(97, 123, 400))) for _ in range(60)]
    return pa.table({"id": range(60), "picture": [source.bytes(3000) for _ in range(60)], "text": words})


def test_parquet_is_compared_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_file, "BLOCK_BYTES", 512)
    path = tmp_path / "a.parquet"
    pq.write_table(noise(0), path, row_group_size=20, compression="none", use_dictionary=False)
    plan = plan_units(str(path), 1000)
    group = pq.ParquetFile(path).metadata.row_group(1)
    by_name = {group.column(number).path_in_schema.split(".")[0]: group.column(number) for number in range(3)}
    whole = read_all(plan)
    assert len(whole) == 60
    for name, expected in (("text", True), ("picture", False)):
        data = bytearray(path.read_bytes())
        place = by_name[name].data_page_offset + by_name[name].total_compressed_size // 2
        data[place] ^= 1
        changed = []
        path.write_bytes(data)
        for unit in plan.units:
            try:
                list(read_documents(unit, CORPUS))
            except ChangedError:
                changed.append(20 <= unit.start < 40)
        assert all(changed), "only units of the second row group"
        assert bool(changed) is expected
        data[place] ^= 1
        path.write_bytes(data)
    assert read_all(plan) == whole


def test_a_planned_file_reads_like_a_file(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(2 * planned_file.BLOCK_BYTES + 17)
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    size = planned_file.BLOCK_BYTES
    blocks = tuple((number, planned_file.block_digest(content[number * size :][:size])) for number in (0, 1, 2))
    with inputs.open_file(str(path)) as raw, planned_file.opened(raw, "a", blocks) as file:
        assert file.read() == content
        assert file.seek(-20, os.SEEK_END) == len(content) - 20
        assert (file.read(10), file.tell()) == (content[-20:-10], len(content) - 10)
        file.seek(size - 5)
        assert file.read(10) == content[size - 5 : size + 5]
        assert (file.seek(len(content)), file.read(1)) == (len(content), b"")
    with inputs.open_file(str(path)) as raw:
        unplanned = planned_file.PlannedFile(raw, "a", blocks[:1])
        unplanned.seek(size)
        with pytest.raises(ChangedError):
            unplanned.read(1)


def test_planning_many_small_files_adds_each_size_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_reads = 0

    class Counted(int):
        """A size that counts how often it is added."""

        def __radd__(self, other: int) -> int:
            nonlocal num_reads
            num_reads += 1
            return int.__add__(self, other)

    for number in range(60):
        (tmp_path / f"{number}.txt").write_text("x")
    scan = plan_units.__globals__["_scan"]

    def counted(path: str, form: str, unit_bytes: int) -> object:
        file, ranges = scan(path, form, unit_bytes)
        return type(file)(file.path, Counted(file.size_bytes), file.sha256), ranges

    monkeypatch.setitem(plan_units.__globals__, "_scan", counted)
    plan = plan_units(str(tmp_path), 1000)
    assert (len(plan.files), len(plan.units), num_reads) == (60, 1, 60)
