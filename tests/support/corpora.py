"""Small inputs for the tests of the readers, and short ways to read them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray.ingest.input_units import plan_units
from ragtune_ray.ingest.readers import read_documents
from ragtune_ray.schema import Document, Reject

LIMIT = 1_000_000


def read(path: Any, unit_bytes: int = LIMIT, limit: int = LIMIT) -> list[Document | Reject]:
    return [item for unit in plan_units(str(path), unit_bytes).units for item in read_documents(unit, limit)]


def documents(path: Any, unit_bytes: int = LIMIT) -> list[Document]:
    items = read(path, unit_bytes)
    assert not [item for item in items if isinstance(item, Reject)]
    return [item for item in items if isinstance(item, Document)]


def only_reject(items: Any) -> Reject:
    (reject,) = [item for item in items if isinstance(item, Reject)]
    return reject


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, Any], row_group_size: int = 1_000_000) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def doc(identifier: Any, text: str = "Mars.") -> dict[str, Any]:
    return {"_id": identifier, "text": text}


def squad(*questions: dict[str, Any]) -> dict[str, Any]:
    other = {"context": "Other.", "qas": [{"id": "z", "question": "Z?", "answers": []}]}
    return {
        "version": "v2.0",
        "data": [
            {"title": "The_Moon", "paragraphs": [{"context": "Moon.", "qas": questions}, other, {"context": "Moon."}]}
        ],
    }


def beir(root: Path) -> Path:
    write(root / "corpus.jsonl", {"_id": "d1", "title": "T", "text": "x", "metadata": {"u": 1}}, doc("d2"))
    write(root / "queries.jsonl", *({"_id": f"q{number}", "text": f"Q{number}?"} for number in range(4)))
    header = "query-id\tcorpus-id\tscore"
    write(root / "qrels" / "train.tsv", header, "q0\td1\t1")
    write(root / "qrels" / "dev.tsv", header, "q1\td1\t2", "q1\td2\t0", "q0\td2\t1", "q1\td1\t1")
    write(root / "qrels" / "test.tsv", header, "q2\td2\t1", "broken", "q2\td1\tnan", "gone\td1\t1")
    return root
