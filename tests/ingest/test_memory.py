"""An input far larger than the limit costs the memory of the limit, not its own: a worker is not killed for one document."""

import tracemalloc
from pathlib import Path

import pytest

from ragtune_ray.config import Corpus
from ragtune_ray.ingest.input_units import plan_units
from ragtune_ray.ingest.readers import read_documents
from ragtune_ray.schema import Document, Reject

MIB = 2**20
LIMIT = MIB
HUGE = 96 * MIB


def write_sparse(path: Path, before: bytes, after: bytes) -> None:
    """A file with a hole of `HUGE` zero bytes, which takes no room on the disk."""
    with path.open("wb") as file:
        file.write(before)
        file.seek(HUGE, 1)
        file.write(after)


@pytest.mark.parametrize(
    ("name", "before", "after", "kept"),
    [
        ("a.txt", b"", b"x", []),
        ("a.pdf", b"%PDF-1.7\n", b"x", []),
        ("a.jsonl", b'{"id": "a", "text": "', b'"}\n{"id": "b", "text": "B"}\n', ["b"]),
        ("b.jsonl", b'{"id": "b", "text": "B"}\n{"id": "a", "text": "', b"x", ["b"]),
    ],
)
def test_a_huge_document_is_refused_without_being_loaded(
    tmp_path: Path, name: str, before: bytes, after: bytes, kept: list[str]
) -> None:
    write_sparse(tmp_path / name, before, after)
    tracemalloc.start()
    try:
        plan = plan_units(str(tmp_path), 4 * MIB)
        items = [item for unit in plan.units for item in read_documents(unit, Corpus(max_document_bytes=LIMIT))]
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (reject,) = [item for item in items if isinstance(item, Reject)]
    assert f"longer than max_document_bytes ({LIMIT:,})" in reject.reason
    assert [item.document_id for item in items if isinstance(item, Document)] == kept
    assert peak_bytes < HUGE / 4
