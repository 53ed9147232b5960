"""Compares the encoding rate while indexing with `SentenceTransformer.encode` in float32, and the recall of both.

    python -m bench.encoding --data SQUAD.json

The peer encodes the same passages in one process with all threads. Ours is `ragtune index` with one single-threaded
actor per core; its rate is passages / (busy seconds / workers), which excludes starting Ray and includes tokenizing.
Recall@5 by document is measured three times: plain sentence-transformers with exact search over whole contexts and over
our passages, and `ragtune retrieve` in dense mode.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from ragtune_ray import schema
from ragtune_ray.cluster.answering.retrieve import retrieve
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.config import Config
from ragtune_ray.index import snapshot
from ragtune_ray.ingest.queries import read_queries
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts


def main() -> None:
    """Measure in a temporary workspace and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/squad/squad-v1.1-24articles.json")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        _run(options, Config().using(f"corpus.path={options.data}", f"queries.path={options.data}"), Path(folder))


def _run(options: argparse.Namespace, settings: Config, folder: Path) -> None:
    rates = []
    for repeat in range(options.repeats):
        url = build_index(settings.using(f"workspace={folder / str(repeat)}"))
        manifest = artifacts.read_manifest(str(url))
        encoding = manifest["encoding"]
        rates.append(manifest["num_passages"] / (encoding["busy_seconds"] / encoding["workers"]))
    opened = snapshot.open_index(str(folder / "0"))
    passages = list(schema.from_table(opened.passages, schema.Passage))
    peer = SentenceTransformer(str(weights.resolve(settings.encoder.model).directory), device="cpu")
    texts = [passage.text for passage in passages]
    peer.encode(texts[:64])
    peer_rates = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        vectors = peer.encode(texts, normalize_embeddings=True)
        peer_rates.append(len(texts) / (time.perf_counter() - started))
    print(
        f"{len(texts)} passages, {torch.get_num_threads()} threads, {options.repeats} repeats, {encoding['workers']} workers"
    )
    _print_rates("ragtune index, steady state", rates)
    _print_rates("SentenceTransformer.encode, float32", peer_rates)
    print(f"ratio of the means: {np.mean(rates) / np.mean(peer_rates):.2f}")
    _recall(settings, folder, peer, passages, vectors)


def _recall(
    settings: Config, folder: Path, peer: SentenceTransformer, passages: list[schema.Passage], vectors: np.ndarray
) -> None:
    questions = [query for query in read_queries(settings.queries.path) if isinstance(query, schema.Query)]
    queries = peer.encode([query.text for query in questions], normalize_embeddings=True)
    documents = [passage.document_id for passage in passages]
    same_passages = _exact_recall(queries, vectors, documents, questions)
    print(f"recall@5 by document, sentence-transformers, same passages: {same_passages:.4f}")
    contexts: dict[str, str] = {}
    for article in json.loads(Path(settings.corpus.path).read_text(encoding="utf-8"))["data"]:
        for number, paragraph in enumerate(article["paragraphs"]):
            contexts[f"{article['title']}/{number}"] = paragraph["context"]
    whole = peer.encode(list(contexts.values()), normalize_embeddings=True)
    whole_contexts = _exact_recall(queries, whole, list(contexts), questions)
    print(f"recall@5 by document, sentence-transformers, whole contexts: {whole_contexts:.4f}")
    run = retrieve(settings.using(f"workspace={folder / '0'}", "retrieval.mode=dense"))
    measured: dict[str, Any] = json.loads((Path(run) / "metrics.json").read_text(encoding="utf-8"))
    print(f"recall@5 by document, ragtune retrieve dense: {measured['recall@5']['value']:.4f}")


def _exact_recall(
    queries: np.ndarray, vectors: np.ndarray, documents: list[str], questions: list[schema.Query]
) -> float:
    """Return recall@5 by document with exact search."""
    found = 0
    for query, scores in zip(questions, queries @ vectors.T, strict=True):
        best = dict.fromkeys(documents[row] for row in np.argsort(-scores, kind="stable")[:40])
        found += query.document_ids[0] in list(best)[:5]
    return found / len(questions)


def _print_rates(name: str, rates: list[float]) -> None:
    print(f"{name:38} {np.mean(rates):7.1f} passages/s  (min {min(rates):.1f}, max {max(rates):.1f})", flush=True)


if __name__ == "__main__":
    main()
