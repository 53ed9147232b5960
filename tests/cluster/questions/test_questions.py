"""`questions` end to end: from an index to a file that `queries.path` reads; resumed after a kill, and the same every time."""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config, schema
from ragtune_ray.cluster import runs, session, stages
from ragtune_ray.cluster.questions import questions, worker
from ragtune_ray.evaluation.questions.writing.making import Maker
from ragtune_ray.index import snapshot
from ragtune_ray.index.retriever import open_retriever
from ragtune_ray.ingest import queries
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.storage import artifacts
from tests.support.openai_server import Server


def passage(number: int, place: int) -> schema.Passage:
    text = (
        f"The code of gate{number}x{place} is secret{number}x{place}. The keeper of this gate drinks tea{number}x{place} "
        "every morning, and reads the paper."
    )
    start = 200 * place
    return schema.Passage(f"d{number}#{place}", f"d{number}", text, f"Vessel {number}", "{}", start, start + len(text))


def reply(body: dict[str, Any]) -> str:
    """A model that writes one good question per passage and kind, and repeats itself about odd documents."""
    system, last = body["messages"][0]["content"], body["messages"][-1]["content"]
    if "your own knowledge" in system:
        return "I don't know."
    names = re.findall(r"(?:gate|tea)(\d+x\d+)", last.rpartition("\n")[2])
    if "passages alone" in system:
        return "I don't know." if "wear" in last else f"secret{names[0]}"
    name = re.findall(r"gate(\d+x\d+)", last)[0]
    if '"first_question"' in system:
        return json.dumps({
            "first_question": f"Who looks after gate{name} there?", "first_answer": "Its keeper",
            "question": f"And which word opens gate{name}?", "standalone": f"Which word opens gate{name} to its keeper?",
            "answer": f"secret{name}", "evidence": [f"The code of gate{name} is secret{name}."],
        })  # fmt: skip
    if "admits what it does not know" in system:
        return json.dumps({"question": f"What does the keeper of gate{name} wear in winter?"})
    question = f"Which word opens gate{name} to visitors?"
    if int(name.partition("x")[0]) % 2:
        question = "Is the gate open to visitors on Sundays?"
    return json.dumps(
        {"question": question, "answer": f"secret{name}", "evidence": f"The code of gate{name} is secret{name}."}
    )


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.finish, server.reply = "stop", reply
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(server: Server, tmp_path: Path, write_index: Callable[..., str]) -> config.Config:
    passages = [passage(number, place) for number in range(12) for place in range(3)]
    write_index(tmp_path / "workspace", passages, HashingEncoder("hashing-64"))
    return config.Config().using(
        f"workspace={tmp_path / 'workspace'}",
        "encoder.model=hashing-64",
        "retrieval.top_k=3",
        "questions.model=scripted",
        f"questions.base_url={server.base_url}",
        "questions.count=12",
        "questions.per_document=3",
        "questions.unit_questions=4",
        "questions.shares={fact: 2, unanswerable: 1, follow_up: 1}",
        "cluster.generator_workers=1",
    )


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units run in this process."""
    monkeypatch.setattr(session, "ray_session", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(session, "use_one_thread", lambda: None)
    monkeypatch.setattr(
        stages, "on_actors", lambda pool: stages.in_process(lambda: worker.QuestionUnit(**pool.arguments))
    )


def content(run: questions.WrittenQuestions) -> dict[str, str]:
    return {
        name: (Path(run.path) / name).read_text() for name in ("questions.jsonl", "refused.jsonl", "passages.jsonl")
    }


def test_questions_are_written_resumed_and_read_as_queries(
    settings: config.Config, server: Server, without_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Maker.make
    calls: list[int] = []

    def dies_at_the_third(self: Maker, *given: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Maker, "make", dies_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            questions.write_questions(settings)
    asked_before = len(server.requests)
    run = questions.write_questions(settings)
    resumed_requests = len(server.requests) - asked_before
    assert questions.write_questions(settings).path == run.path
    assert len(server.requests) == asked_before + resumed_requests, "a finished run asks nothing"

    facts = run.manifest
    assert facts["kinds"] == {"fact": 6, "unanswerable": 3, "follow_up": 3}
    assert facts["refused"]["yes or no"] > 0
    assert facts["num_drawn"] == facts["num_questions"] + sum(facts["refused"].values())
    assert facts["notice"] == ""
    assert facts["found"]["documents"] <= facts["found"]["questions"] == 9
    rows = run.rows()
    assert [row["query_id"] for row in rows] == list(dict.fromkeys(row["query_id"] for row in rows))
    texts = {number: "".join(passage(number, place).text.ljust(200) for place in range(3)) for number in range(12)}
    for row in rows:
        for span in row["evidence"]:
            assert texts[int(span["document_id"][1:])][span["start"] : span["end"]] == span["text"]
    by_document: dict[str, set[str]] = {}
    for row in rows:
        by_document.setdefault(row["passage_ids"][0].partition("#")[0], set()).add(row["split"])
    assert all(len(split) == 1 for split in by_document.values()), "a document is in one split"
    assert max(sum(row["passage_ids"][0].startswith(f"{name}#") for row in rows) for name in by_document) <= 3

    read = list(queries.read_queries(run.questions))
    assert all(isinstance(query, schema.Query) for query in read)
    kinds = {row["query_id"]: row["kind"] for row in rows}
    for query in read:
        assert isinstance(query, schema.Query)
        assert (query.answers == ()) == (kinds[query.query_id] == "unanswerable")
        assert len(query.messages) == (2 if kinds[query.query_id] == "follow_up" else 0)

    other = settings.with_values({"workspace": str(tmp_path / "other")})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index").symlink_to(tmp_path / "workspace" / "index")
    undisturbed = questions.write_questions(other)
    assert content(undisturbed) == content(run), "the same seed gives the same questions, killed or not"
    assert content(questions.write_questions(settings.with_values({"seed": 1}))) != content(run)
    lines = questions.report_lines(run)
    assert any("yes or no" in line and line.split()[-1] == str(facts["refused"]["yes or no"]) for line in lines)


def test_a_server_that_fails_is_an_error_and_is_asked_again(
    settings: config.Config, server: Server, without_ray: None
) -> None:
    server.reply = lambda _: (400, {}, '{"error": {"message": "no such model"}}')
    with pytest.raises(questions.QuestionsError, match=r"16 of 16 requests failed.*no such model"):
        questions.write_questions(settings)
    server.reply = reply
    assert questions.write_questions(settings).manifest["num_questions"] == 12


def test_questions_that_all_fail_name_the_reasons(settings: config.Config, server: Server, without_ray: None) -> None:
    server.reply = lambda _: "I would rather not."
    with pytest.raises(
        questions.QuestionsError, match=r"no question of \d+ passed the filters \(malformed reply: \d+\)"
    ):
        questions.write_questions(settings.using("questions.max_attempts=1", "questions.max_draws=1"))


@pytest.mark.cluster
def test_questions_are_written_on_ray(settings: config.Config, shared_ray: None) -> None:
    run = questions.write_questions(settings.using("questions.count=4", "questions.shares={fact: 1}"))
    assert artifacts.find_problems(run.path) == []
    assert runs.read_manifest(run.path)["kinds"] == {"fact": 4}


@pytest.mark.cluster
def test_questions_about_an_index_in_shards_have_the_ranks_of_the_whole_one(
    settings: config.Config, shared_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings.using("questions.count=4", "questions.shares={fact: 1}", "retrieval.mode=hybrid")
    opened: list[int] = []
    open_index = snapshot.open_index

    def note(*given: Any, **named: Any) -> snapshot.Index:
        index = open_index(*given, **named)
        opened.append(len(index.segments))
        return index

    monkeypatch.setattr(snapshot, "open_index", note)
    divided = questions.write_questions(settings.using("cluster.shard_bytes=1")).rows()
    assert opened == [1], "the driver draws from one segment, and opens nothing else"
    assert "drawn from 1 of its 2 segments" in capsys.readouterr().err
    of_one = {int(row["document_ids"][0][1:]) // 6 for row in divided}
    assert len(of_one) == 1, "all documents are in one segment"

    def ranks(asked: config.Config) -> list[int]:
        searched = open_retriever(asked).retrieve_passages([row["text"] for row in divided], 3)
        wanted = [row["document_ids"][0] for row in divided]
        found = [[hit.document_id for hit in hits] for hits, _ in searched]
        return [names.index(name) + 1 if name in names else 0 for names, name in zip(found, wanted, strict=True)]

    assert [row["rank"] for row in divided] == ranks(settings)
