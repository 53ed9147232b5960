"""Files are found and opened locally and remotely, and lines are read with their places."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.spec import AbstractBufferedFile

from ragtune_ray.ingest import inputs, listing
from ragtune_ray.ingest.input_units import input_fingerprint, plan_units
from ragtune_ray.ingest.inputs import InputError
from ragtune_ray.ingest.queries import read_queries
from ragtune_ray.schema import Document, Reject
from ragtune_ray.storage import filesystem
from tests.support.corpora import beir, doc, documents, read, squad, write, write_parquet

LIMIT = 1_000_000


def test_local_names_with_special_characters_are_read(tmp_path: Path) -> None:
    names = ["a b#1?.txt", "c::d.txt", "[e]*.txt", "百.txt", "~x.txt"]
    for name in names:
        write(tmp_path / name, "x")
    assert sorted(item.document_id for item in documents(tmp_path)) == sorted(names)


def test_long_line_is_rejected_with_its_size_but_never_loaded(tmp_path: Path) -> None:
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


def test_remote_file_without_readline_limit_is_read_like_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", doc(1), "x" * 500, doc(2), "{", doc(3))
    data, expected = path.read_bytes(), [read(path, size, limit=100) for size in (1, 200, 10**6)]

    class RemoteFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
        def _fetch_range(self, start: int, end: int) -> bytes:
            return data[start:end]

    monkeypatch.setattr(inputs, "open_file", lambda _: RemoteFile(None, "a", size=len(data), block_size=64))
    assert [read(path, size, limit=100) for size in (1, 200, 10**6)] == expected
    assert [type(item) for item in expected[0]] == [Document, Reject, Document, Reject, Document]


def test_remote_file_system_is_read_like_a_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.md", "# A")
    write(tmp_path / "b" / "b.jsonl", *(doc(number) for number in range(50)))
    write(tmp_path / "b" / ".git" / "c.txt", "hidden")
    write_parquet(tmp_path / "d.parquet", {"id": [str(number) for number in range(50)], "text": ["x"] * 50})
    write(tmp_path / "e.json", squad())
    write(tmp_path / "f.png", "x")
    beir(tmp_path / "beir")
    root = "memory://readers-test"
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path) + "/", "/readers-test/", recursive=True)
    try:
        local, remote = (plan_units(path, 200, fingerprint="sha256") for path in (str(tmp_path), root + "/"))
        assert [file.sha256 for file in remote.files] == [file.sha256 for file in local.files]
        assert input_fingerprint(remote) == input_fingerprint(local)
        assert remote.rejects[-1].place == f"{root}/f.png"
        assert len(remote.rejects) == len(local.rejects) == 4

        def moved(items: list[Any]) -> str:
            return repr(items).replace(root, str(tmp_path))

        assert [unit.content() for unit in remote.units] == [unit.content() for unit in local.units]
        monkeypatch.setattr(listing, "_THREADS", 1)  # all below the root at once
        assert repr([*plan_units(root, 200, fingerprint="sha256").units]) == repr([*remote.units])
        assert moved(read(root, 200)) == repr(read(tmp_path, 200))
        assert moved([*read_queries(f"{root}/beir")]) == repr([*read_queries(str(tmp_path / "beir"))])
        with pytest.raises(InputError, match="no such file"):
            plan_units(f"{root}/missing.jsonl", 200)
    finally:
        store.rm("/readers-test", recursive=True)


def test_absolute_removes_dots_and_keeps_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("docs")
    monkeypatch.chdir(tmp_path / "work")
    file = str(tmp_path / "docs" / "sub" / "a.md")
    assert filesystem.absolute("../docs/./sub/a.md") == file
    assert filesystem.absolute(f"{tmp_path}/docs/sub/../sub//a.md") == file
    assert filesystem.absolute("../link/sub/a.md") == str(tmp_path / "link" / "sub" / "a.md")
    assert filesystem.absolute("s3://bucket/a/../b/") == "s3://bucket/a/../b"


def test_dots_after_a_link_lead_to_the_parent_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "real" / "docs").mkdir()
    (tmp_path / "current").symlink_to("real/deep")
    assert filesystem.absolute(f"{tmp_path}/current/../docs") == str(tmp_path.resolve() / "real" / "docs")
    (tmp_path / "docs").mkdir()  # what the path would name without the link
    assert filesystem.absolute(f"{tmp_path}/current/../docs") == str(tmp_path.resolve() / "real" / "docs")
