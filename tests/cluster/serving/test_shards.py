"""The endpoint with an index that is divided among three shards, on a local Ray: what an undivided one replies, or 503."""

import concurrent.futures
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ragtune_ray import config
from ragtune_ray.answering import searching
from ragtune_ray.cluster.indexing.update import upsert_documents
from ragtune_ray.cluster.serving.serve import running
from ragtune_ray.index import filters
from ragtune_ray.index.retriever import open_retriever
from tests.support.endpoints import CHAT, QUICK, eventually, question, replica_processes
from tests.support.shards import changed_index

pytestmark = [pytest.mark.timeout(1500), pytest.mark.serve, pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]

RETRIEVE = "/v1/retrieve"


@pytest.fixture(scope="module")
def settings(
    tmp_path_factory: pytest.TempPathFactory, settings_for: Callable[..., config.Config], corpus: Path
) -> config.Config:
    folder = tmp_path_factory.mktemp("shards")
    made = settings_for(folder / "workspace", *QUICK, "serve.retriever.shards=3", "retrieval.candidates=12")
    return changed_index(made, corpus, folder)


@pytest.fixture(scope="module")
def address(settings: config.Config, shared_ray: None) -> Iterator[str]:
    with running(settings) as found:
        yield found


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=300) as client:
        yield client


def undivided(settings: config.Config, texts: searching.Texts, chosen: dict[str, Any], top_k: int = 5) -> list[Any]:
    """Ids and scores that a process with the whole index finds."""
    retriever = open_retriever(settings)
    retriever._allowed = retriever.index.allowed(filters.parse_filter(chosen))
    ((passages, scores),) = searching.search_passages(retriever, [texts], settings.retrieval, top_k)
    return [(passage.passage_id, passage.text, score) for passage, score in zip(passages, scores, strict=True)]


def shown(sources: list[dict[str, Any]]) -> list[Any]:
    return [(source["id"], source["text"], source["score"]) for source in sources]


def test_hits_are_those_of_the_undivided_index(http: httpx.Client, settings: config.Config) -> None:
    for number in (1, 5, 20, 47):
        text = f"What is the code of vessel{number}?"
        for chosen in ({}, {"parity": 1}):
            found = http.post(RETRIEVE, json={"query": text, "filter": chosen, "top_k": 5}).json()
            assert shown(found["data"]) == undivided(settings, (text,), chosen)
    talk = [("user", "Tell me of vessel7."), ("assistant", "It sails."), ("user", "And what is its code?")]
    messages = [{"role": role, "content": content} for role, content in talk]
    replied = http.post(CHAT, json={"messages": messages}).json()
    texts = ("Tell me of vessel7.\nAnd what is its code?", "And what is its code?")
    expected = undivided(settings, texts, {})
    assert shown(replied["sources"]) == expected[: len(replied["sources"])]
    assert replied["sources"]
    (retriever,) = http.get("/readyz").json()["retrievers"]
    assert (retriever["num_shards"], retriever["needed_shards"], retriever["silent_shards"]) == (3, 3, [])


def test_a_change_is_found_and_listed(http: httpx.Client) -> None:
    row = {"document_id": "kraken", "text": "The code of kraken is tentacle.", "metadata": {"kind": "beast"}}
    added = http.post("/v1/documents", json={"documents": [row]}).json()
    assert (added["added"], added["copies_that_serve_it"]) == (1, 1)
    found = http.post(RETRIEVE, json={"query": "What is the code of kraken?", "top_k": 1}).json()
    assert (found["index_version"], found["data"][0]["text"]) == (added["index_version"], row["text"])
    listed = http.get("/v1/documents", params={"filter": '{"kind": "beast"}'}).json()
    assert [(each["document_id"], each["num_passages"]) for each in listed["data"]] == [("kraken", 1)]
    gone = http.request("DELETE", "/v1/documents", json={"document_ids": ["kraken"]}).json()
    assert gone["deleted"] == 1
    assert http.post(RETRIEVE, json={"query": "kraken", "filter": {"kind": "beast"}}).json()["data"] == []


def test_shards_of_two_versions_never_answer_together(
    http: httpx.Client, address: str, settings: config.Config, tmp_path: Path
) -> None:
    """Each version gives every one of some documents of different shards the version's own text."""
    names = ["d3", "d25", "d55"]

    def publish(edition: int) -> str:
        path = tmp_path / f"edition{edition}.jsonl"
        rows = [{"document_id": name, "text": f"The gazette prints edition{edition} of {name}."} for name in names]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return upsert_documents(settings, str(path)).name

    edition_of = {publish(0): 0}
    eventually(
        lambda: http.get("/readyz").json()["retrievers"][0]["index_version"] in edition_of,
        "the first edition is served",
    )
    seen: list[tuple[str, set[str]]] = []
    done = False

    def ask() -> None:
        with httpx.Client(base_url=address, timeout=300) as own:
            while not done:
                reply = own.post(RETRIEVE, json={"query": "gazette prints edition", "top_k": 3})
                assert reply.status_code == 200, reply.text
                body = reply.json()
                seen.append((body["index_version"], {source["text"].split()[3] for source in body["data"]}))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        try:
            for edition in (1, 2, 3):
                edition_of[publish(edition)] = edition
                eventually(lambda: edition_of.keys() == {version for version, _ in seen}, "the edition is found")
        finally:
            done = True
        for each in asking:
            each.result()
    assert {version for version, _ in seen} == edition_of.keys()
    assert all(words == {f"edition{edition_of[version]}"} for version, words in seen)


def test_a_lost_shard_fails_requests_until_it_is_back_and_never_shortens_them(
    http: httpx.Client, settings: config.Config
) -> None:
    text = "What is the code of vessel5?"
    expected = undivided(settings, (text,), {})
    for lost in (signal.SIGSTOP, signal.SIGKILL):
        (process,) = replica_processes("Shard2")
        os.kill(process, lost)
        replies = [http.post(RETRIEVE, json={"query": text, "top_k": 5}) for _ in range(2)]
        if lost is signal.SIGSTOP:
            assert [(reply.status_code, reply.headers["retry-after"]) for reply in replies] == [(503, "2")] * 2
            eventually(
                lambda: http.get("/readyz").json()["problems"] == ["shard 2 of the index does not answer"],
                "it is known",
            )
            os.kill(process, signal.SIGCONT)
        assert all(reply.status_code in (200, 503) for reply in replies)
        assert all(shown(reply.json()["data"]) == expected for reply in replies if reply.status_code == 200)
        eventually(lambda: http.get("/readyz").status_code == 200, "the shard is back")
        assert shown(http.post(RETRIEVE, json={"query": text, "top_k": 5}).json()["data"]) == expected
    assert replica_processes("Shard2") != [process]
    assert http.post(CHAT, json=question(5)).status_code == 200
