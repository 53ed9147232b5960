"""The latency of an index in shards is measured with one process per shard, which find the same."""

from pathlib import Path

import pytest

from ragtune_ray import schema
from ragtune_ray.answering import searching
from ragtune_ray.cluster.comparing import latency
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.index import snapshot
from ragtune_ray.index.retriever import open_retriever

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]


def test_shards_find_what_the_whole_index_does(tmp_path: Path, settings_for, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path / "workspace", "index.segment_passages=64")
    build_index(settings)
    retrieval = settings.retrieval
    asked = [(f"What is the code of vessel{number}?", f"vessel{number}") for number in range(3)]
    expected = searching.search_passages(open_retriever(settings), asked, retrieval, retrieval.top_k)

    def refuse(*_: object, **given: object) -> snapshot.Index:
        raise AssertionError("this process opens no index")

    with monkeypatch.context() as patched:
        patched.setattr(snapshot, "open_index", refuse)
        with latency._search(settings.using("cluster.shard_bytes=1"), "000001") as search:
            found = [search(texts) for texts in asked]
    names = [[passage.passage_id for passage in passages] for passages, _ in found]
    assert names == [[passage.passage_id for passage in passages] for passages, _ in expected]
    assert [scores for _, scores in found] == [pytest.approx(scores) for _, scores in expected]
    query = schema.Query("q1", "What is the code of vessel1?", None, (), (), "all")
    (measured,) = latency.measure([(settings.using("cluster.shard_bytes=1"), "000001")], [query, query])
    assert measured.n == 2
    assert measured.retrieval.p50_seconds > 0
