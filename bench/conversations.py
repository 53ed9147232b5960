"""Measures retrieval for questions that follow a conversation: as asked, with the last turns, and rewritten by the generator.

    python -m bench.conversations --data SQUAD.json [--questions 100] [--set generator.model=...]

The conversations are made from SQuAD. In a paragraph, questions that name the article's title are asked one after another:

    follow-up   the first names the title, the second has "it" in its place
    third turn  the first names the title, the second and the third have "it"
    new topic   a question as it is in SQuAD, after one about another article, so that rewriting can only harm

Each question is followed by its gold answer. The relevant document of the last question is its paragraph. Every way is compared
with no rewriting on the same questions by a paired bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ragtune_ray.cluster import session
from ragtune_ray.cluster.answering.retrieve import retrieve
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.config import Config
from ragtune_ray.evaluation.intervals import paired_bootstrap
from ragtune_ray.ingest.queries import read_queries
from ragtune_ray.schema import Query
from ragtune_ray.storage import artifacts

SHOWN = ("recall@5", "MRR@10")
WAYS = ("none", "last_turns", "generator")
BEFORE = "about|are|at|by|can|did|do|does|for|from|has|in|into|is|of|on|that|to|was|were|what|when|where|which|who|with"
"""Words after which a title is a phrase by itself, so that a pronoun can replace it; "the new it" is no English."""
Row = dict[str, Any]


def main() -> None:
    """Index once, then retrieve for each kind of conversation in each way, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/squad/squad-v1.1-24articles.json")
    parser.add_argument("--questions", type=int, default=100, help="questions of each kind")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--set", action="append", default=[], help="another setting, section.field=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        settings = Config().using(f"corpus.path={options.data}", f"workspace={folder}", *options.set)
        build_index(settings)
        with session.ray_session(settings.cluster):
            for kind, rows in _conversations(options.data, options.questions).items():
                path = Path(folder, f"{kind.replace(' ', '-')}.jsonl")
                path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                _measure(settings.using(f"queries.path={path}"), kind, options.ways)


def _measure(settings: Config, kind: str, ways: list[str]) -> None:
    found = {way: _scores(settings.using(f"retrieval.rewrite={way}")) for way in ways}
    for way, (scores, note) in found.items():
        cells = []
        for metric in SHOWN:
            gap = paired_bootstrap(found[ways[0]][0][metric], scores[metric], 10_000, 0.95, 0)
            cells.append(f"{metric} {scores[metric].mean():.3f} ({gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}])")
        print(f"{kind:10} n {len(scores[SHOWN[0]]):3}  {way:10}  {'  '.join(cells)}  {note}", flush=True)


def _scores(settings: Config) -> tuple[dict[str, np.ndarray], str]:
    """Metric -> the value of each question, in the order of their ids; and what rewriting did."""
    run = str(retrieve(settings))
    table = pq.read_table(Path(run) / "scores.parquet").sort_by("query_id")
    wrote = artifacts.read_manifest(run).get("rewriting")
    note = f"{wrote['num_rewritten']} rewritten, {wrote['fallbacks']}, {wrote['busy_seconds']:.0f} s" if wrote else ""
    return {metric: np.asarray(table[metric], dtype=np.float64) for metric in SHOWN}, note


def _conversations(path: str, count: int) -> dict[str, list[Row]]:
    """Kind -> rows of a questions file."""
    paragraphs: dict[str, list[Query]] = {}
    for query in read_queries(path):
        if isinstance(query, Query) and query.answers and _named(query):
            paragraphs.setdefault(query.document_ids[0], []).append(query)
    follow_ups = [_row(asked[:2]) for asked in paragraphs.values() if len(asked) > 1]
    thirds = [_row(asked[:3]) for asked in paragraphs.values() if len(asked) > 2]
    return {
        "follow-up": _spread(follow_ups, count),
        "third turn": _spread(thirds, count),
        "new topic": _spread(list(_new_topics(list(paragraphs.values()))), count),
    }


def _spread(rows: list[Row], count: int) -> list[Row]:
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[place] for place in places]


def _title(query: Query) -> str:
    return query.document_ids[0].partition("/")[0].replace("_", " ")


def _named(query: Query) -> re.Match[str] | None:
    """Where a question names the title of its article as a phrase by itself; the name is in the group `name`."""
    title = rf"\b(?:{BEFORE}) (?P<name>(?:the )?{re.escape(_title(query))}(?P<own>'s)?)(?!\w)"
    found = re.search(title, query.text, re.IGNORECASE)
    return found if found and not re.match(r"[ ,]+[A-Z]", query.text[found.end() :]) else None


def _with_pronoun(query: Query) -> str:
    named = _named(query)
    assert named is not None
    return query.text[: named.start("name")] + ("its" if named["own"] else "it") + query.text[named.end("name") :]


def _row(asked: list[Query]) -> Row:
    texts = [asked[0].text, *map(_with_pronoun, asked[1:])]
    turns = zip(texts[:-1], asked[:-1], strict=True)
    messages = [turn for text, query in turns for turn in _said(text, query)]
    return {
        "query_id": asked[-1].query_id,
        "text": texts[-1],
        "document_ids": asked[-1].document_ids,
        "messages": messages,
    }


def _said(text: str, query: Query) -> list[Row]:
    assert query.answers
    return [{"role": "user", "content": text}, {"role": "assistant", "content": query.answers[0]}]


def _new_topics(paragraphs: list[list[Query]]) -> Iterator[Row]:
    half = len(paragraphs) // 2
    for (query, *_), (other, *_) in zip(paragraphs[:half], paragraphs[half:], strict=False):
        if _title(query) != _title(other):
            messages = _said(other.text, other)
            yield {
                "query_id": query.query_id,
                "text": query.text,
                "document_ids": query.document_ids,
                "messages": messages,
            }


if __name__ == "__main__":
    main()
