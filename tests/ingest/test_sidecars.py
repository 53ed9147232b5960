"""What the place of a file, its own properties and a JSON file beside it say becomes metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ragtune_ray.config import Corpus
from ragtune_ray.ingest.input_units import input_fingerprint, plan_units
from ragtune_ray.ingest.inputs import ChangedError
from ragtune_ray.ingest.readers import read_documents
from ragtune_ray.schema import Document, Reject
from tests.support.corpora import documents, read, rewrite, write


def test_path_folders_front_matter_and_sidecar_become_metadata(tmp_path: Path) -> None:
    write(tmp_path / "root.txt", "x")
    write(tmp_path / "a" / "b" / "c.md", "---\ntitle: C\nyear: 1\nowner: me\n---\ntext")
    stated = {"title": "Better", "owner": "acme", "url": "https://a.org/c", "tags": ["x", "y"]}
    write(tmp_path / "a" / "b" / "c.md.meta.json", stated)
    named, root = documents(tmp_path)
    assert (named.document_id, named.title, named.text.strip()) == ("a/b/c.md", "Better", "text")
    assert json.loads(named.metadata) == {
        "path": "a/b/c.md",
        "folder": ["a", "a/b"],
        "year": 1,
        "owner": "acme",
        "url": "https://a.org/c",
        "tags": ["x", "y"],
    }
    assert json.loads(root.metadata) == {"path": "root.txt"}
    (alone,) = documents(tmp_path / "a" / "b" / "c.md")
    assert (alone.title, alone.document_id) == ("Better", "c.md")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "its .meta.json file is not JSON"),
        ("[1]", "must contain a JSON object, found list"),
        ('{"title": 3}', "title must be text"),
        ('{"x": "' + "y" * 2**20 + '"}', "longer than"),
    ],
)
def test_a_document_with_a_broken_sidecar_is_a_reject(tmp_path: Path, content: str, reason: str) -> None:
    write(tmp_path / "a.txt", "secret of one tenant")
    (tmp_path / "a.txt.meta.json").write_text(content)
    (item,) = read(tmp_path)
    assert isinstance(item, Reject)
    assert reason in item.reason
    assert item.place == str(tmp_path / "a.txt")


def test_a_sidecar_without_its_file_is_a_reject(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x")
    write(tmp_path / "b.txt.meta.json", {"owner": "acme"})
    plan = plan_units(str(tmp_path), 1000)
    assert [(Path(item.place).name, item.reason) for item in plan.rejects] == [
        ("b.txt.meta.json", "describes 'b.txt', which is not beside it")
    ]


def test_a_changed_sidecar_is_a_change(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x")
    sidecar = write(tmp_path / "a.txt.meta.json", {"owner": "acme"})
    plan = plan_units(str(tmp_path), 1000)
    rewrite(sidecar, sidecar.read_bytes().replace(b"acme", b"evil"))
    with pytest.raises(ChangedError, match=r"a\.txt\.meta\.json changed while it was indexed"):
        list(read_documents(plan.units[0], Corpus()))
    assert input_fingerprint(plan) != input_fingerprint(plan_units(str(tmp_path), 1000))
    sidecar.unlink()
    with pytest.raises(ChangedError):
        list(read_documents(plan.units[0], Corpus()))


def test_the_time_of_a_file_is_read_only_if_asked_for(tmp_path: Path) -> None:
    os.utime(write(tmp_path / "a.txt", "x"), (1_700_000_000, 1_700_000_000))
    (unit,) = plan_units(str(tmp_path), 1000).units
    found = [item for timed in (False, True) for item in read_documents(unit, Corpus(file_times=timed))]
    assert [item.modified for item in found if isinstance(item, Document)] == ["", "2023-11-14T22:13:20+00:00"]
