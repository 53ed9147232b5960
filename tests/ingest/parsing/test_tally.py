"""What was read of each kind of file, and how much of its text was kept."""

from __future__ import annotations

from pathlib import Path

from ragtune_ray.config import Corpus
from ragtune_ray.ingest.input_units import plan_units
from ragtune_ray.ingest.parsing import tally
from ragtune_ray.ingest.readers import UnitRead, read_documents
from tests.support.corpora import doc, write


def test_files_rejects_and_kept_characters_are_counted_by_kind(tmp_path: Path) -> None:
    write(tmp_path / "a.html", "<body><nav>menu</nav><p>four teen</p>")
    write(tmp_path / "b.htm", "<p>x</p>")
    write(tmp_path / "c.md", "---\ntitle: left out\n---\n1. text")
    write(tmp_path / "d.html", "<div>" * 6_000)
    write(tmp_path / "e.jsonl", doc(1), "{", doc(2))
    write(tmp_path / "f.docx", "broken")
    plan = plan_units(str(tmp_path), 100)
    found = []
    for unit in plan.units:
        read = UnitRead()
        for item in read_documents(unit, Corpus(), read):
            read.tally.of(item)
        found.append(read.tally.counts())
    assert tally.added(found) == {
        ".docx": {"rejected": 1},
        ".htm": {"read": 1, "plain_characters": 1, "kept_characters": 1},
        ".html": {
            "read": 1,
            "rejected": 1,
            "plain_characters": len("menufourteen"),
            "kept_characters": len("fourteen"),
        },
        ".jsonl": {"read": 2, "rejected": 1},
        ".md": {"read": 1, "plain_characters": 5, "kept_characters": 5},
    }
    assert [line.split() for line in tally.table(tally.added(found))][3] == [".html", "1", "1", "66.7", "%", "of", "12"]
