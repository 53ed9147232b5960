"""Bulk retrieval and answers for questions that follow a conversation: rewritten, resumed, paid for, and as the endpoint does."""

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ragtune_ray import config, schema
from ragtune_ray.answering.searching import search_ordinals, search_passages
from ragtune_ray.asking import ask
from ragtune_ray.cluster import session, staged_queries
from ragtune_ray.cluster.answering.answer import answer
from ragtune_ray.cluster.answering.evaluate import read_answers
from ragtune_ray.cluster.answering.passages import Found, Shown
from ragtune_ray.cluster.answering.retrieve import retrieve
from ragtune_ray.cluster.answering.rewrite import RewriteUnit, Searching
from ragtune_ray.cluster.answering.workers import RetrieveUnit
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.serving.generator import GeneratorReplica
from ragtune_ray.cluster.training.example_workers import PrepareUnit
from ragtune_ray.index.retriever import open_retriever
from ragtune_ray.serving.backend import Job
from ragtune_ray.storage import artifacts
from tests.support.openai_server import Server

pytestmark = pytest.mark.cluster

SAID = [{"role": "user", "content": "Where is vessel4?"}, {"role": "assistant", "content": "At sea."}]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve questions that stand alone and twelve that follow a turn about vessel4."""
    path = tmp_path / "follow.jsonl"
    alone = [
        {"query_id": f"a{n}", "text": f"What is the code of vessel{n}?", "document_ids": [f"d{n}"]} for n in range(12)
    ]
    follow = [
        {"query_id": f"f{n}", "text": "And its code?", "document_ids": ["d4"], "messages": SAID} for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*alone, *follow]))
    return path


@pytest.fixture
def server() -> Iterator[Server]:
    """A generator that rewrites the follow-up, and repeats everything else in capitals."""
    with Server() as made:
        made.finish = "stop"
        shown = "Conversation:\nUser: Where is vessel4?\nAssistant: At sea.\n\nLast question: And its code?"
        made.scripts[shown] = ["What is the code of vessel4?"]
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_a_follow_up_is_rewritten_searched_answered_and_paid_for(
    tmp_path: Path, rows: Path, settings_for, server: Server, shared_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "log_with_serve", lambda: None)
    written: config.Config = settings_for(
        tmp_path / "workspace",
        f"queries.path={rows}",
        "generator.engine=openai",
        "generator.model=stub",
        f"generator.base_url={server.base_url}",
        "retrieval.rewrite=generator",
        "evaluate.cutoffs=[1, 5]",
        "cluster.encoder_workers=1",
        "cluster.generator_workers=1",
    )
    build_index(written)

    # The first half of the units was finished by a job that was killed.
    with staged_queries.staged_queries(written) as staged:
        searching = Searching.of(written, staged)
        assert searching.run is not None
        worker = RewriteUnit(written, staged.url, f"{searching.run.work}/searches")
        worker.run({"unit": 2, "start": 16, "stop": 24})
    asked = len(server.requests)
    assert asked == 8
    found = retrieve(written)
    assert len(server.requests) == asked + 4, "only f0 to f3 were left to rewrite; questions alone need no generator"
    scores = {row["query_id"]: row for row in pq.read_table(Path(found) / "scores.parquet").to_pylist()}
    assert all(scores[f"f{n}"]["recall@1"] == 1.0 for n in range(12))

    answers = answer(written)
    assert len(server.requests) == asked + 4 + 24, "answering shares the texts that retrieval searched for"
    facts = answers.manifest["rewriting"]
    assert facts == found.manifest["rewriting"]
    assert (facts["num_rewritten"], facts["num_split"], facts["fallbacks"]) == (12, 0, {})
    assert (facts["prompt_tokens"], facts["completion_tokens"]) == (12 * 7, 12 * 3)
    assert artifacts.open_artifact(facts["path"], "rewrite").path.exists()
    by_id = {row.query_id: row for row in read_answers(str(answers))}
    assert by_id["f0"].passage_ids[0].startswith("d4#")
    assert by_id["f0"].query == "And its code?", "the answer is to the question as it was asked"

    # A job with more questions takes over what one with the first of them wrote.
    more = written.using("seed=1")
    with session.ray_session(more.cluster):
        asked, known, last = len(server.requests), "", None
        for limit, requests in ((16, 4), (24, 8)):
            with staged_queries.staged_queries(more.using(f"queries.limit={limit}")) as staged:
                last = Searching.of(more, staged)
                last.write(staged, known)
                assert last.run is not None
                known = last.run.url
            asked += requests
            assert len(server.requests) == asked
        assert last.facts()["rewriting"]["prompt_tokens"] == 12 * 7, "all are paid for"

    # The same conversation, asked alone and at the endpoint.
    query = staged_queries.selected_queries(written)[12]
    alone = ask(written, query.text, query.messages)
    assert (alone.answer.passage_ids, alone.answer.answer) == (by_id["f0"].passage_ids, by_id["f0"].answer)
    replica = GeneratorReplica(written)
    job = Job(query.text, "rag", (), (), "", query.history, "", 8, 0.0, (), 0, closed_book=True)
    served = asyncio.run(replica.write_searches(job, 60))
    replica.__del__()
    assert served.texts == ("What is the code of vessel4?",)
    assert job.query == dataclasses.replace(query, query_id="ask", document_ids=(), relevances=())


def test_a_retriever_learns_from_the_text_that_is_searched_for(
    tmp_path: Path, rows: Path, settings_for, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "use_one_thread", lambda: None)
    settings = settings_for(
        tmp_path / "workspace",
        f"queries.path={rows}",
        "training.objective=contrastive",
        "training.hard_negatives=2",
        "training.negative_depth=8",
        "training.negative_margin=0",
    )
    build_index(settings)
    with staged_queries.staged_queries(settings) as staged:
        hits = str(tmp_path / "found")
        retrieves = RetrieveUnit(settings, "000001", staged.url, 8, hits, shown=Shown(gold=True, vectors=True))
        retrieves.run({"unit": 0, "start": 0, "stop": staged.num_queries})
        found = Found(hits, hits, 1, staged.num_queries)
        worker = PrepareUnit(settings, "000001", staged.url, "train", str(tmp_path / "made"), found=found)
        worker.run({"unit": 0, "start": 10, "stop": 14})
    made = pq.read_table(tmp_path / "made" / "unit-00000000.examples.parquet")
    by_id = {row.query_id: row for row in schema.from_table(made, schema.RetrieverExample)}
    assert by_id["a10"].query == "What is the code of vessel10?"
    assert by_id["f0"].query == "Where is vessel4?\nAnd its code?"
    assert by_id["f0"].passage_ids[0].startswith("d4#")
    # The hits of both texts compete for the negatives, as they do for a prompt.
    retriever = open_retriever(settings)
    texts = [("Where is vessel4?\nAnd its code?", "And its code?")]
    ((ordinals, scores),) = search_ordinals(retriever, texts, settings.retrieval, 8)
    ((passages, again),) = search_passages(retriever, texts, settings.retrieval, 8)
    found = [passage.passage_id for passage in retriever.index.take(ordinals)]
    assert (found, scores) == ([passage.passage_id for passage in passages], again)
    others = [name for name in found if not name.startswith("d4#")]
    assert list(by_id["f0"].passage_ids[1:]) == others[:2]


def test_questions_without_a_conversation_keep_the_names_of_their_runs(tmp_path: Path, settings_for) -> None:
    """For any `retrieval.rewrite`, such questions are searched as they are."""
    alone = schema.Query("q", "Who?", None, (), (), "all")
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"query_id": "q", "text": "Who?"}) + "\n")
    settings = settings_for(tmp_path, f"queries.path={path}")

    def identity(given: config.Config) -> dict[str, object]:
        with staged_queries.staged_queries(given) as staged:
            return Searching.of(given, staged).identity(given, {}, staged)

    before = identity(settings)
    assert before == settings.retrieval.identity()
    assert {"rewrite", "decompose", "rewriting"}.isdisjoint(before)
    for rewrite in ("none", "last_turns", "generator"):
        assert identity(settings.using(f"retrieval.rewrite={rewrite}")) == before
    split = identity(settings.using("retrieval.decompose=true"))
    assert set(split) - set(before) == {"decompose", "rewriting"}
    path.write_text(json.dumps({"query_id": "q", "text": "Who?", "messages": SAID}) + "\n")
    assert identity(settings.using("retrieval.rewrite=none")) == {**before, "rewrite": "none"}
    split_ways = {
        identity(settings.using("retrieval.decompose=true", f"retrieval.rewrite={way}"))["rewriting"]
        for way in ("none", "last_turns", "generator")
    }
    assert len(split_ways) == 3, "what is split after the last turns is not what is split alone"
    written = identity(settings.using("retrieval.rewrite=generator"))
    assert set(written) - set(before) == {"rewrite", "rewriting"}
    assert alone.identity()[-1] == "all"
