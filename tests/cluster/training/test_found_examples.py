"""Examples from an index in shards equal those from the whole: passages, cosines and vectors come from the shard that has them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragtune_ray import config
from ragtune_ray.cluster import actors
from ragtune_ray.cluster.answering import finding
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.training import prepare
from ragtune_ray.index import snapshot, versions

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]


@pytest.fixture(scope="module")
def given(settings_for, tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """An index of several segments, and 40 queries split by document."""
    settings: config.Config = settings_for(
        tmp_path_factory.mktemp("examples") / "workspace",
        "queries.split_by=document",
        "retrieval.top_k=2",
        "index.segment_passages=40",
        "training.max_tokens=900",
        "training.hard_negatives=2",
    )
    build_index(settings)
    assert len(versions.read_version(settings.workspace, "000001").entries) > 3
    return settings


def made(settings: config.Config) -> dict[str, pa.Table]:
    """The files of a run; the run is removed, as one in shards has the same name."""
    path = Path(prepare.prepare(settings))
    names = [each.name for each in sorted(path.glob("*.parquet"))]
    tables = {name: pq.read_table(path / name) for name in names}
    shutil.rmtree(path)
    return tables


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.objective=query_side", "training.negative_margin=0.05"),
        ("training.objective=contrastive", "retrieval.mode=lexical", "training.negative_margin=0"),
        ("training.objective=sft", "training.distractors=passage"),
    ],
)
def test_examples_from_shards_equal_those_from_the_whole(
    given: config.Config, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str]
) -> None:
    monkeypatch.setattr(finding, "UNIT_QUERIES", 10)
    pools: list[actors.Pool] = []
    plain = actors.run
    monkeypatch.setattr(actors, "run", lambda pool, units: pools.append(pool) or plain(pool, units))
    settings = given.using(*overrides)
    whole = made(settings)
    sharded = made(settings.using("cluster.shard_bytes=1"))
    assert whole == sharded
    assert whole[prepare.TRAIN].num_rows > 10
    assert "SearchUnit" in {pool.worker.__name__ for pool in pools}
    assert {pool.options["num_cpus"] for pool in pools} == {1}
    if prepare.POOL in whole:
        pool = whole[prepare.POOL]
        index = snapshot.open_index(settings.workspace)
        names = index.passages["passage_id"].to_pylist()
        places = [names.index(name) for name in pool["passage_id"].to_pylist()]
        stored = index.vectors.take(pa.array(places).to_numpy())
        assert pool["vector"].to_pylist() == stored.tolist()
    if settings.training.objective == "sft":
        shown = {tuple(row["passage_ids"]) for row in whole[prepare.TRAIN].to_pylist()}
        assert max(map(len, shown)) == 2, "a positive passage and a neighbor of it"
