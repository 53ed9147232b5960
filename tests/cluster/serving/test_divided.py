"""An index divided among shard replicas in this process: the hits of the undivided index, or none."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayError

from ragtune_ray import config
from ragtune_ray.answering import searching
from ragtune_ray.cluster.serving import divided, replicas, retriever, shard
from ragtune_ray.cluster.serving.divided import DividedIndex, ShardError, Shards
from ragtune_ray.cluster.serving.shard import ShardReplica
from ragtune_ray.index import filters, snapshot, versions
from ragtune_ray.models.encoder import load_encoder
from ragtune_ray.serving.backend import without_metadata
from tests.support.shards import LocalHandle, changed_index

pytestmark = pytest.mark.cluster

EVERY = filters.Filter()
QUESTIONS: list[searching.Texts] = [(f"What is the code of vessel{number}?",) for number in (1, 2, 5, 33, 47)]
QUESTIONS += [("nothing known", "vessel7"), ("code code vessel20", "repainted", "harbour"), ("?",)]


class StandInReranker:
    """A deterministic stand-in for a cross-encoder."""

    first_stage_weight = 0.5

    def score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        return np.array([sum(map(ord, text)) % 101 + len(query) for query, text in pairs], dtype=np.float32)


@pytest.fixture(scope="module")
def settings(
    tmp_path_factory: pytest.TempPathFactory, settings_for: Callable[..., config.Config], corpus: Path
) -> config.Config:
    folder = tmp_path_factory.mktemp("divided")
    made = changed_index(settings_for(folder / "workspace", "retrieval.candidates=12"), corpus, folder)
    assert len(versions.read_version(made.workspace, versions.current_version(made.workspace)).entries) >= 4
    return made


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas set up their process; this one stays as it is."""
    for module in (shard, retriever):
        monkeypatch.setattr(module, "prepare_process", lambda *_: None)
    monkeypatch.setattr(divided, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr("sys.setswitchinterval", lambda _: None)


@pytest.fixture
def handles_of() -> Iterator[Callable[[config.Config, int], list[LocalHandle]]]:
    """A function from a config to handles of this many shards."""
    made: list[LocalHandle] = []

    def handles(settings: config.Config, num_shards: int) -> list[LocalHandle]:
        made.extend(LocalHandle(ShardReplica(settings, number, num_shards)) for number in range(num_shards))
        return made[-num_shards:]

    yield handles
    for handle in made:
        handle.stop()


def both(
    settings: config.Config, handles: list[LocalHandle], reranker: Any = None
) -> tuple[retriever.WholeIndex, DividedIndex]:
    encoder = None if settings.retrieval.mode == "lexical" else load_encoder(settings.encoder)
    name = versions.current_version(settings.workspace)
    opened = snapshot.open_index(settings.workspace, name)
    whole = retriever.WholeIndex(settings, opened, encoder, reranker)
    return whole, DividedIndex(settings, name, Shards(handles), encoder, reranker)


def found(index: Any, top_k: int, visible: filters.Filter = EVERY) -> list[tuple[list[Any], list[float]]]:
    """The passages, as they are sent between replicas, and their scores; questions searched one by one and together."""
    alone = [index.search([each], top_k, visible)[0] for each in QUESTIONS]
    together = index.search(QUESTIONS, top_k, visible)
    return [([*map(without_metadata, passages)], scores) for passages, scores in [*alone, *together]]


@pytest.mark.parametrize("num_shards", [2, 9])
@pytest.mark.parametrize(
    "overrides",
    [
        ["retrieval.mode=dense"],
        ["retrieval.mode=lexical"],
        ["retrieval.mode=hybrid"],
        ["retrieval.mode=hybrid", "retrieval.fusion=ranks"],
        ["retrieval.mode=hybrid", "retrieval.reranker=stand-in", "retrieval.rerank_candidates=7"],
    ],
)
def test_shards_find_what_the_whole_index_finds(
    settings: config.Config, handles_of: Any, overrides: list[str], num_shards: int
) -> None:
    chosen = settings.using(*overrides)
    reranker = StandInReranker() if chosen.retrieval.reranker else None
    whole, sharded = both(chosen, handles_of(chosen, num_shards), reranker)
    for parity in (None, 1, 7):
        visible = EVERY if parity is None else filters.parse_filter({"parity": parity})
        expected = found(whole, 5, visible)
        assert any(passages for passages, _ in expected) is (parity != 7)
        assert found(sharded, 5, visible) == expected
        assert found(sharded, 5, visible) == expected, "the frequencies of tokens are known now"
    assert found(sharded, 200) == found(whole, 200), "more than any shard has"


def test_a_hit_that_no_shard_sent_at_once_is_fetched(
    settings: config.Config, handles_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles = handles_of(settings, 3)
    whole, sharded = both(settings, handles)
    search = ShardReplica.search

    async def send_one(self: ShardReplica, *arguments: Any) -> shard.Searched:
        return await search(self, *arguments[:-1], 1)

    monkeypatch.setattr(ShardReplica, "search", send_one)
    assert found(sharded, 5) == found(whole, 5)
    assert any("take" in handle.calls for handle in handles)


def test_documents_are_listed_as_from_the_whole_index(settings: config.Config, handles_of: Any) -> None:
    whole, sharded = both(settings, handles_of(settings, 3))
    for visible in (EVERY, filters.parse_filter({"parity": 1})):
        after, more = "", True
        while more:
            page, more = whole.list_documents(visible, after, 7)
            assert sharded.list_documents(visible, after, 7) == (page, more)
            after = page[-1].document_id


def test_each_shard_opens_its_own_segments_and_all_of_them_the_index(settings: config.Config, handles_of: Any) -> None:
    name = versions.current_version(settings.workspace)
    entries = versions.read_version(settings.workspace, name).entries
    opened = [handle.replica._versions[name] for handle in handles_of(settings, 3)]
    digests = [segment.manifest_sha256 for each in opened for segment in each.index.segments]
    assert digests == [entry.manifest_sha256 for entry in entries]
    assert next(each.offset for each in opened) == 0
    assert all(0 < len(each.index.segments) < len(entries) for each in opened)


def test_words_are_counted_once(settings: config.Config, handles_of: Any) -> None:
    handles = handles_of(settings, 2)
    _, sharded = both(settings, handles)
    expected = sharded.search(QUESTIONS[:1], 3, EVERY)
    after = DividedIndex(settings, sharded.version, Shards(handles), load_encoder(settings.encoder), None, sharded)
    for index in (sharded, after):
        for handle in handles:
            handle.calls.clear()
        assert index.search(QUESTIONS[:1], 3, EVERY) == expected
        assert all("count" not in handle.calls and "search" in handle.calls for handle in handles)


@pytest.mark.parametrize("num_failures", [1, 3, 99])
def test_a_lost_replica_is_asked_again_and_a_lost_shard_fails_the_search(
    settings: config.Config, handles_of: Any, num_failures: int
) -> None:
    handles = handles_of(settings, 3)
    whole, sharded = both(settings, handles)
    left = iter(range(num_failures))

    def fail(method: str) -> None:
        if method == "search" and next(left, None) is not None:
            raise RayActorError

    handles[1].before_call = fail
    if num_failures < replicas.ATTEMPTS:
        assert sharded.search(QUESTIONS, 3, EVERY)[0][1] == whole.search(QUESTIONS, 3, EVERY)[0][1]
    else:
        with pytest.raises(ShardError, match="shard 2 of 3"):
            sharded.search(QUESTIONS, 3, EVERY)
        assert handles[1].calls.count("search") == replicas.ATTEMPTS
        assert all(handle.num_cancelled for handle in handles), "the other shards need not go on"


def test_a_shard_that_hangs_or_raises_fails_the_search(settings: config.Config, handles_of: Any) -> None:
    handles = handles_of(settings, 2)
    _, sharded = both(settings, handles)
    shards = Shards(handles)
    assert asyncio.run(shards.silent()) == []

    def fail(_: str) -> None:
        raise RayError("unpicklable")

    handles[0].before_call = fail
    with pytest.raises(ShardError, match="cannot answer"):
        sharded.search(QUESTIONS, 3, EVERY)
    assert asyncio.run(shards.silent()) == [0]
    may_go_on = threading.Event()
    handles[0].before_call = lambda _: assert_set(may_go_on)
    calls = shards.begin("respond", {0: (), 1: ()})
    with pytest.raises(ShardError, match="shard 1 of 2 does not answer"):
        shards.replies(calls, 0.05)
    may_go_on.set()


def assert_set(event: threading.Event) -> None:
    assert event.wait(60)


def test_a_version_is_opened_by_the_call_that_names_it_and_closed_once_no_request_can_name_it(
    settings: config.Config,
) -> None:
    name = versions.current_version(settings.workspace)
    before = f"{int(name) - 1:06d}"
    replica = ShardReplica(settings, 0, 2)

    async def scenario() -> None:
        await asyncio.gather(*(replica.count(before, ["code"]) for _ in range(3)))
        assert list(replica._versions) == [name, before]
        shared = [
            {segment.manifest_sha256: segment for segment in each.index.segments} for each in replica._versions.values()
        ]
        assert all(shared[0][digest] is shared[1][digest] for digest in shared[0].keys() & shared[1].keys())
        replica._versions[before].used -= 3 * settings.serve.timeout_seconds
        del replica._versions[name]
        await replica.count(name, ["code"])
        assert list(replica._versions) == [before, name], "the latest one stays"
        replica._versions[before].used -= 3 * settings.serve.timeout_seconds
        await replica.open(f"{int(name) - 2:06d}")
        assert before not in replica._versions

    asyncio.run(scenario())


def test_a_version_that_cannot_be_opened_fails_its_call_alone(settings: config.Config) -> None:
    replica = ShardReplica(settings, 0, 2)
    name = versions.current_version(settings.workspace)

    async def scenario() -> None:
        with pytest.raises(Exception, match="000099"):
            await replica.open("000099")
        assert (await replica.count(name, ())).num_passages > 0

    asyncio.run(scenario())


def test_a_request_to_a_lost_shard_is_refused_for_a_moment(settings: config.Config, handles_of: Any) -> None:
    handles = handles_of(settings, 2)
    replica = retriever.RetrieverReplica(settings, handles)
    try:
        query = (QUESTIONS[0], 3, EVERY, time.monotonic() + 60)
        (answered,) = replica._retrieve_all([query])
        assert len(answered.passages) == 3

        def fail(_: str) -> None:
            raise RayActorError

        handles[1].before_call = fail
        (refused,) = replica._retrieve_all([query])
        assert (refused.status, refused.code, refused.retry_after_seconds) == (503, "unavailable", 2)
        listed = asyncio.run(replica.list_documents(EVERY, "", 5))
        assert (listed.status, listed.retry_after_seconds) == (503, 2)
        status = asyncio.run(replica.status())
        assert (status["num_shards"], status["silent_shards"]) == (2, [2])
    finally:
        replica._current.stop()


def test_an_index_that_outgrows_its_shards_is_served_and_says_so(
    settings: config.Config, handles_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    grown = settings.using("cluster.shard_bytes=1")
    num_segments = len(versions.read_version(grown.workspace, versions.current_version(grown.workspace)).entries)
    for num_shards in (1, 2):
        replica = retriever.RetrieverReplica(grown, handles_of(grown, num_shards) if num_shards > 1 else ())
        replica._current.stop()
        status = asyncio.run(replica.status())
        assert (status["num_shards"], status["needed_shards"]) == (num_shards, num_segments)
        assert f"the endpoint has {num_shards}, which now open more" in caplog.text
