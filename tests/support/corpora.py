"""Small inputs for the tests of the readers, and short ways to read them."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray.config import Corpus
from ragtune_ray.ingest.input_units import Plan, lines_before, plan_units
from ragtune_ray.ingest.inputs import resolve_place
from ragtune_ray.ingest.readers import UnitRead, read_documents
from ragtune_ray.schema import Document, Reject

LIMIT = 1_000_000


def read(path: Any, unit_bytes: int = LIMIT, limit: int = LIMIT) -> list[Document | Reject]:
    return read_plan(plan_units(str(path), unit_bytes), limit)


def read_plan(plan: Plan, limit: int = LIMIT) -> list[Document | Reject]:
    """What all units contain, with the places that users see."""
    found = [UnitRead() for _ in plan.units]
    corpus = Corpus(max_document_bytes=limit)
    items = [list(read_documents(unit, corpus, read)) for unit, read in zip(plan.units, found, strict=True)]
    before = lines_before(plan, [read.num_lines for read in found])
    return [
        replace(item, place=resolve_place(item.place, lines))
        for unit, lines in zip(items, before, strict=True)
        for item in unit
    ]


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


def rewrite(path: Path, data: bytes) -> None:
    """Change a file's content a second later, which is more than the clock of any file system leaves out."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


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


WORDS = (
    "amber basalt cedar delta ember fjord garnet harbor island jasper kelp lagoon meadow nectar orchid pebble quartz river "
    "sable tundra umber valley willow zephyr copper marble silver velvet walnut cobalt"
).split()


def write_corpus(path: Path, num_documents: int, seed: int = 0) -> None:
    """Documents of a few sentences; document N alone says that its number is N."""
    source = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_documents):
            sentences = [" ".join(source.choices(WORDS, k=12)).capitalize() + "." for _ in range(source.randint(2, 9))]
            sentences.insert(source.randint(0, len(sentences)), f"The code of vessel{number} is secret{number}.")
            row = {"document_id": f"d{number}", "title": f"Vessel {number}", "text": " ".join(sentences)}
            file.write(json.dumps(row) + "\n")


def write_queries(path: Path, num_queries: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_queries):
            row = {
                "query_id": f"q{number}",
                "text": f"What is the code of vessel{number}?",
                "answers": [f"secret{number}"],
                "document_ids": [f"d{number}"],
            }
            file.write(json.dumps(row) + "\n")
