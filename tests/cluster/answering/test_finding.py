"""Answers from an index in shards: the same hits, prompts and answers as from the whole, also after an interruption."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config, schema
from ragtune_ray.cluster import actors
from ragtune_ray.cluster.answering import finding
from ragtune_ray.cluster.answering.answer import answer
from ragtune_ray.cluster.answering.evaluate import read_answers
from ragtune_ray.cluster.answering.workers import NO_GOLD_PASSAGE
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.indexing.update import delete_documents, upsert_documents
from ragtune_ray.index import snapshot, versions
from ragtune_ray.storage import artifacts
from tests.support.corpora import write_corpus

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]

Settings = Callable[..., config.Config]
SHARDED = "cluster.shard_bytes=1"


@pytest.fixture(scope="module")
def settings_of(tmp_path_factory: pytest.TempPathFactory, settings_for: Settings, shared_ray: None) -> Settings:
    """A function from overrides to a config, on one index of many segments with deleted and replaced passages."""
    folder = tmp_path_factory.mktemp("found")
    corpus, changes = folder / "corpus.jsonl", folder / "changes.jsonl"
    write_corpus(corpus, 60)
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    changed = [
        {**rows[number], "text": rows[number]["text"].replace("The code", "The repainted code")}
        for number in (1, 20, 33)
    ]
    changes.write_text("".join(json.dumps(row) + "\n" for row in changed))

    def settings(*overrides: str) -> config.Config:
        given = (f"corpus.path={corpus}", "index.segment_passages=32", "queries.unindexed=keep")
        return settings_for(folder / "workspace", *given, *overrides)

    build_index(settings())
    delete_documents(settings(), ["d2", "d3", "d30", "d59"])
    upsert_documents(settings(), str(changes))
    assert len(versions.read_version(settings().workspace, "000003").entries) > 5
    return settings


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "UNIT_QUERIES", 12)  # the generators' units of 8 cross them


def answers_of(settings: config.Config) -> list[dict[str, Any]]:
    """The rows of a run, without what differs each time; the run is removed, as one in shards has the same name."""
    path = str(answer(settings))
    rows = [{**vars_of(row), "seconds": 0.0} for row in read_answers(path)]
    shutil.rmtree(path)
    return rows


def vars_of(row: schema.Answer) -> dict[str, Any]:
    return {name: getattr(row, name) for name in schema.Answer.__slots__}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("retrieval.mode=lexical", "retrieval.top_k=3"),
        ("answer.gold_passage=true",),
        ("answer.reading=apart", "cluster.encoder_workers=1", "cluster.generator_workers=1"),
    ],
)
def test_answers_from_shards_equal_those_from_the_whole(settings_of: Settings, overrides: Sequence[str]) -> None:
    settings = settings_of("retrieval.candidates=12", *overrides)
    whole = answers_of(settings)
    assert whole == answers_of(settings.using(SHARDED, "cluster.encoder_workers=3"))
    assert len(whole) == 40
    shown = {name for row in whole for name in row["passage_ids"]}
    assert not {name for name in shown if schema.document_id_of(name) in {"d2", "d3", "d30", "d59"}}
    if settings.answer.gold_passage:
        missing = [row["query_id"] for row in whole if row["error"].endswith(NO_GOLD_PASSAGE)]
        assert missing == ["q2", "q3", "q30"]
        assert [name.partition("#")[0] for row in whole for name in row["passage_ids"]] == [
            f"d{number}" for number in range(40) if number not in (2, 3, 30)
        ]


@pytest.mark.parametrize("sharded", ["", SHARDED])
def test_prompts_contain_the_passages_of_the_current_version(
    settings_of: Settings, openai_stub: Any, sharded: str
) -> None:
    asked: dict[str, str] = {}

    def reply(prompt: str) -> str:
        asked[prompt.rpartition("Question: ")[2]] = prompt
        return "noted [1]"

    openai_stub.reply = reply
    settings = settings_of(
        "generator.engine=openai",
        "generator.model=stub",
        f"generator.base_url={openai_stub.url}",
        "queries.limit=24",
        *filter(None, [sharded]),
    )
    rows = answers_of(settings)
    index = snapshot.open_index(settings.workspace)
    for row in rows:
        texts = [index.by_id([name])[name].text for name in row["passage_ids"]]
        assert len(texts) == settings.retrieval.top_k
        places = [asked[row["query"]].index(f"[{rank}] ") for rank in range(1, len(texts) + 1)]
        for place, text in zip(places, texts, strict=True):
            assert asked[row["query"]].find(text, place) - place < 40, "its text stands after its number"
        assert row["citations"][0].passage_id == row["passage_ids"][0]
    assert "The repainted code of vessel1" in asked["What is the code of vessel1?"]


@pytest.mark.parametrize(("sharded", "then"), [("", ""), (SHARDED, ""), (SHARDED, "cluster.shard_bytes=1000000000")])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    settings_of: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sharded: str, then: str
) -> None:
    settings = settings_of("retrieval.candidates=13", *filter(None, [sharded]))
    undisturbed = answers_of(settings)

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("stopped before publishing")

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "publish", fail)
        with pytest.raises(RuntimeError, match="stopped before"):
            answer(settings)
    (work,) = (Path(settings.workspace) / "runs" / ".work").glob("answer-*")
    (work / "answers" / "unit-00000004.json").unlink()
    for marker in [*work.glob("hits*/*.json"), *work.glob("passages-*/*.json")][::2]:
        marker.unlink()
    capsys.readouterr()
    assert answers_of(settings.using(*filter(None, [then]))) == undisturbed
    said = [line for line in capsys.readouterr().err.splitlines() if "were finished by an earlier run" in line]
    assert "answer (rag): 32 of 40 queries were finished by an earlier run and are skipped" in said
    assert not work.exists()


def test_only_hits_of_unanswered_questions_are_found(settings_of: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = answer(settings_of("queries.limit=24", "answer.unit_queries=12"))
    searched: list[int] = []
    plain = finding.runs.run_over_queries

    def spy(name: str, directory: str, units: Sequence[dict[str, Any]], *given: Any, **named: Any) -> Any:
        searched.extend(unit["unit"] for unit in units if name == "retrieve")
        return plain(name, directory, units, *given, **named)

    monkeypatch.setattr(finding.runs, "run_over_queries", spy)
    more = settings_of("answer.unit_queries=12")
    found = read_answers(str(answer(more, known=first.path)))
    assert searched == [2, 3]
    shutil.rmtree(first.path)
    assert [row.passage_ids for row in found] == [row["passage_ids"] for row in answers_of(more)]


@pytest.mark.parametrize("sharded", ["", SHARDED])
def test_every_process_of_a_job_reserves_a_core(
    settings_of: Settings, monkeypatch: pytest.MonkeyPatch, sharded: str
) -> None:
    pools: list[actors.Pool] = []
    plain = actors.run

    def spy(pool: actors.Pool, units: Sequence[str]) -> Any:
        pools.append(pool)
        return plain(pool, units)

    monkeypatch.setattr(actors, "run", spy)
    answers_of(settings_of("retrieval.top_k=4", *filter(None, [sharded])))
    names = ["EncodeUnit", "CountUnit", "SearchUnit", "MergeUnit", "PassagesUnit"] if sharded else ["RetrieveUnit"]
    assert [pool.worker.__name__ for pool in pools] == [*names, "GenerateUnit"]
    assert {pool.options["num_cpus"] for pool in pools} == {1}
    assert {pool.num_actors for pool in pools} == {2}, "as the settings say"
