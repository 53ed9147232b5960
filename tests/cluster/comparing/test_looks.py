"""Asking stops where the verdict stands, and arms that cannot win answer no further questions."""

import json
from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.cluster import staged_queries
from ragtune_ray.cluster.answering import evaluate
from ragtune_ray.cluster.answering.answer import answer
from ragtune_ray.cluster.comparing import looks
from ragtune_ray.cluster.comparing.compare import compare, read_comparison
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.storage import artifacts

pytestmark = [pytest.mark.timeout(900), pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Eighty questions to which the stub server gives the gold answer."""
    path = tmp_path / "questions.jsonl"
    rows = [{"id": f"q{number}", "text": f"What is {number}?", "answers": ["forty-two"]} for number in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_asking_stops_with_the_verdict(settings_for, openai_stub, questions, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(looks, "BATCH_QUESTIONS", 20)
    overrides = [
        f"queries.path={questions}",
        "queries.limit=0",
        "answer.unit_queries=10",
        "compare.arms=[base, base@one, base@two]",
        "compare.latency_queries=1",
        "compare.gold_passages=false",
        "compare.until=decided",
        # Both servers answer alike: with this margin 20 questions do not show it, 40 do.
        "compare.margin=0.2",
        "cluster.generator_workers=1",
    ]
    hosted = {name: {"model": name, "base_url": openai_stub.url} for name in ("one", "two")}
    plain = settings_for(tmp_path / "workspace", *overrides[:3]).model_dump(mode="json")
    settings = config.load_config(plain, {"compare.hosted": hosted}).using(*overrides)
    build_index(settings)
    run = compare(settings)
    found = read_comparison(run)
    assert found["looks"] == {
        "available": 80, "looks": 2, "asked": {"base": 20, "base@one": 40, "base@two": 40}, "dropped": ["base"],
    }  # fmt: skip
    assert found["verdict"]["outcome"] == "recommended"
    assert found["verdict"]["arm"] in ("base@one", "base@two")
    assert found["verdict"]["reason"][-1] == (
        "40 of 80 questions were asked, in 2 batches; base was dropped after 20: 42% of all answers."
    )
    assert found["arms"]["base"]["quality"]["EM"]["n"] == 20
    assert found["arms"]["base@one"]["quality"]["EM"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 40}
    assert found["questions"]["total"] == 40
    answered = artifacts.read_manifest(run.manifest["evaluated"])["runs"]
    assert set(answered) == {"base@one", "base@two"}
    asked = [row.query_id for row in evaluate.read_answers(answered["base@one"])]
    assert asked != sorted(asked), "in random order"
    assert len(set(asked)) == 40
    assert openai_stub.num_requests <= 2 * (40 + 2), "no question is answered twice"
    assert compare(settings).path == run.path


def test_answers_of_the_first_questions_are_taken_over(settings_for, openai_stub, questions, tmp_path) -> None:
    settings = settings_for(
        tmp_path / "workspace",
        f"queries.path={questions}",
        "queries.limit=20",
        "answer.unit_queries=10",
        "answer.arm=base",
        "generator.engine=openai",
        f"generator.base_url={openai_stub.url}",
    )
    first = answer(settings)
    before = openai_stub.num_requests
    more = answer(settings.with_values({"queries.limit": 30}), known=first.path)
    assert openai_stub.num_requests - before == 10
    rows = evaluate.read_answers(more.path)
    assert rows[:20] == evaluate.read_answers(first.path)
    assert [row.query_id for row in rows] == [f"q{number}" for number in range(30)]
    one, both = (artifacts.read_manifest(run.path) for run in (first, more))
    assert both["busy_seconds"]["generation"] > one["busy_seconds"]["generation"] - 0.002
    assert both["queries_per_second"] < 30 / (20 / one["queries_per_second"]) * 1.01, "their time counts"


def test_shuffled_questions_keep_their_order_when_more_are_taken(settings_for, questions, tmp_path) -> None:
    def ids(*overrides: str) -> list[str]:
        settings = settings_for(tmp_path, f"queries.path={questions}", *overrides)
        return [row.query_id for row in staged_queries.selected_queries(settings)]

    everything = ids("queries.order=shuffled", "queries.limit=0")
    assert sorted(everything) == sorted(ids("queries.limit=0")) != everything
    assert ids("queries.order=shuffled", "queries.limit=30") == everything[:30]
    assert ids("queries.order=shuffled", "queries.limit=0", "queries.split_seed=1") != everything
