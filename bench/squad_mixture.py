"""Writes SQuAD v1.1 questions and a share of the unanswerable v2.0 questions on the same contexts to one file of queries.

    python -m bench.squad_mixture V1.json V2.json OUT.jsonl --percent 10

A generator that has never seen a question without an answer does not abstain. `--percent` of the unanswerable questions
are taken, chosen by a hash of their id. They carry the document id of v1.1, so that both files split alike.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ragtune_ray import schema
from ragtune_ray.ingest import queries, rows


def main() -> None:
    """Write the file and print the number of questions of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answerable")
    parser.add_argument("unanswerable")
    parser.add_argument("output")
    parser.add_argument("--percent", type=int, default=10)
    options = parser.parse_args()
    written = [_row(query) for query in _read(options.answerable)]
    num_answerable = len(written)
    written += unanswerable(options.answerable, options.unanswerable, options.percent)
    Path(options.output).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), "utf-8")
    print(
        f"{num_answerable:,} answerable and {len(written) - num_answerable:,} unanswerable questions: {options.output}"
    )


def unanswerable(first: str, second: str, percent: int) -> Iterator[dict[str, Any]]:
    """Yield the unanswerable questions of `second` on contexts that `first` also contains."""
    ids = {context.text: context.document_id for context in _contexts(first)}
    renamed = {context.document_id: ids.get(context.text) for context in _contexts(second)}
    for query in _read(second):
        document_id = renamed[query.document_ids[0]]
        if query.answers == () and document_id and zlib.crc32(query.query_id.encode()) % 100 < percent:
            yield {**_row(query), "query_id": f"u{query.query_id}", "document_ids": [document_id]}


def _contexts(path: str) -> Iterator[rows.Context]:
    return rows.squad_contexts(rows.parse_json(Path(path).read_bytes()))


def _read(path: str) -> list[schema.Query]:
    return [row for row in queries.read_queries(path) if isinstance(row, schema.Query)]


def _row(query: schema.Query) -> dict[str, Any]:
    return {
        "query_id": query.query_id,
        "text": query.text,
        "answers": list(query.answers or ()),
        "document_ids": list(query.document_ids),
    }


if __name__ == "__main__":
    main()
