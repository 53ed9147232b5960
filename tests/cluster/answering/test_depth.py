"""Retrieval for metrics goes deeper until there are enough documents. In this process, without Ray."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ragtune_ray import config
from ragtune_ray.cluster import runs, session
from ragtune_ray.cluster.answering import retrieve as retrieve_module
from ragtune_ray.cluster.answering.retrieve import retrieve
from ragtune_ray.cluster.indexing.index import build_index


@contextlib.contextmanager
def no_session(*_: Any, **__: Any) -> Iterator[None]:
    yield


@pytest.fixture
def depths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The depths of the searches; stages run in this process."""
    searched: list[int] = []

    def run_here(name: str, directory: str, units: list[Any], worker: Any, arguments: Any, *_: Any, **__: Any) -> Any:
        if "depth" in arguments:
            searched.append(arguments["depth"])
        actor = worker(**arguments)
        return [json.loads(actor({"unit": np.array([json.dumps(unit)])})["summary"][0]) for unit in units]

    monkeypatch.setattr(session, "use_one_thread", lambda: None)
    monkeypatch.setattr(session, "ray_session", no_session)
    monkeypatch.setattr(runs, "run_over_queries", run_here)
    return searched


@pytest.fixture
def settings(tmp_path: Path) -> config.Config:
    """Fifteen documents of 30 passages, which share the word of the question in falling density."""
    texts = [" ".join(f"anchor{' anchor' * (15 - n)} w{n}x{m}." for m in range(30)) for n in range(15)]
    corpus, queries = tmp_path / "corpus.jsonl", tmp_path / "queries.jsonl"
    corpus.write_text("".join(json.dumps({"document_id": f"d{n}", "text": t}) + "\n" for n, t in enumerate(texts)))
    queries.write_text(json.dumps({"query_id": "q", "text": "anchor", "document_id": "d3"}) + "\n")
    built = config.Config().using(
        f"workspace={tmp_path / 'workspace'}", f"corpus.path={corpus}", f"queries.path={queries}",
        "encoder.model=hashing-64", "chunking.size_tokens=20", "chunking.overlap_tokens=0", "retrieval.mode=lexical",
    )  # fmt: skip
    build_index(built)
    return built


def documents_of(run: Path) -> list[str]:
    hits = pq.read_table(run / "hits.parquet").to_pylist()
    assert [hit["rank"] for hit in hits] == list(range(1, len(hits) + 1))
    return list(dict.fromkeys(hit["document_id"] for hit in hits))


def test_recall_at_ten_sees_ten_documents(settings: config.Config, depths: list[int]) -> None:
    run = Path(retrieve(settings))
    assert depths[0] == 20
    assert len(depths) > 1
    assert depths[1:] == [80, 320, 1000][: len(depths) - 1]
    assert len(documents_of(run)) >= 10
    assert json.loads((run / "metrics.json").read_text())["recall@10"]["value"] == 1


def test_shards_go_as_deep_and_find_the_same(
    settings: config.Config, depths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = settings.using(
        "index.segment_passages=80", "encoder.unit_passages=64", f"workspace={settings.workspace}-sharded"
    )
    build_index(small)
    whole = pq.read_table(Path(retrieve(small)) / "hits.parquet")
    for path in (Path(small.workspace) / "runs").glob("retrieve-*"):
        path.rename(path.with_name("moved"))
    sharded = Path(retrieve(small.using("cluster.shard_bytes=1")))
    assert json.loads((sharded / "manifest.json").read_text())["num_shards"] > 2
    assert pq.read_table(sharded / "hits.parquet") == whole


def test_the_search_ends_at_the_most_hits_and_with_enough_documents(
    settings: config.Config, depths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieve(settings.using("evaluate.cutoffs=[1]"))
    assert depths == [20], "one document is there at once"
    depths.clear()
    monkeypatch.setattr(retrieve_module, "MOST_HITS", 30)
    retrieve(settings)
    assert depths == [20, 30]


@pytest.mark.parametrize("sharded", ["", "cluster.shard_bytes=1"])
def test_a_corpus_of_few_documents_is_searched_once(settings: config.Config, depths: list[int], sharded: str) -> None:
    """Fifteen documents of many passages: metrics at 40 can never see 40 documents."""
    given = settings.using("evaluate.cutoffs=[40]", *filter(None, [sharded]))
    passages = pq.read_table(Path(retrieve(given.using("evaluate.depth=1000"))) / "hits.parquet").num_rows
    assert 15 < passages < 1000
    depths.clear()
    assert len(documents_of(Path(retrieve(given.using(f"evaluate.depth={passages}"))))) == 15
    assert set(depths) == {passages}


def test_summaries_of_older_units_do_not_say_whether_hits_are_short(
    settings: config.Config, depths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = runs.run_over_queries

    def without_short(*given: Any, **named: Any) -> Any:
        return [{key: value for key, value in each.items() if key != "short"} for each in here(*given, **named)]

    monkeypatch.setattr(runs, "run_over_queries", without_short)
    retrieve(settings)
    assert depths == [20]
