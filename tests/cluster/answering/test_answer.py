"""Bulk retrieval, answering and evaluation on Ray."""

import itertools
import json
from pathlib import Path

import ir_measures
import pyarrow.parquet as pq
import pytest
from ir_measures import RR, R, nDCG

from ragtune_ray import schema
from ragtune_ray.answering.pipeline import Task, answer_tasks
from ragtune_ray.cluster.answering.answer import AnswerError, answer
from ragtune_ray.cluster.answering.evaluate import evaluate, read_answers
from ragtune_ray.cluster.answering.retrieve import retrieve
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.generation.generator import load_generator
from ragtune_ray.index.retriever import open_retriever
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts
from ragtune_ray.terminal import evaluation_lines

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, settings_for, shared_ray: None) -> Path:
    path = tmp_path_factory.mktemp("workspace")
    build_index(settings_for(path))
    return path


def test_metrics_equal_those_of_ir_measures_on_the_same_files(workspace: Path, settings_for) -> None:
    run = Path(retrieve(settings_for(workspace)))
    written = json.loads((run / "metrics.json").read_text())
    best: dict[tuple[str, str], float] = {}
    for line in (run / "run.trec").read_text().splitlines():
        query_id, _, passage_id, rank, _, _ = line.split()
        key = (query_id, passage_id.rsplit("#", 1)[0])
        best[key] = max(best.get(key, 0.0), 1.0 / int(rank))
    scored = [ir_measures.ScoredDoc(query_id, document_id, score) for (query_id, document_id), score in best.items()]
    qrels = [ir_measures.Qrel(f"q{number}", f"d{number}", 1) for number in range(40)]
    expected = ir_measures.calc_aggregate([R @ 1, R @ 5, RR @ 10, nDCG @ 10], qrels, scored)
    for name, measure in (("recall@1", R @ 1), ("recall@5", R @ 5), ("MRR@10", RR @ 10), ("nDCG@10", nDCG @ 10)):
        assert written[name]["value"] == pytest.approx(expected[measure], abs=1e-9)
        assert written[name]["n"] == 40
        assert written[name]["low"] <= written[name]["value"] <= written[name]["high"]
    assert written["recall@5"]["value"] > 0.9, "the vessel's number stands in one document alone"


def test_every_query_gets_its_full_number_of_hits_in_order(workspace: Path, settings_for) -> None:
    run = Path(retrieve(settings_for(workspace, "evaluate.depth=6", "evaluate.cutoffs=[1]")))
    hits = list(schema.from_table(pq.read_table(run / "hits.parquet"), schema.Hit))
    assert [hit.query_id for hit in hits] == [f"q{number}" for number in range(40) for _ in range(6)]
    assert [hit.rank for hit in hits] == list(range(1, 7)) * 40
    for before, after in itertools.pairwise(hits):
        assert before.query_id != after.query_id or before.score >= after.score


def test_bulk_answers_equal_answers_made_in_this_process(workspace: Path, settings_for) -> None:
    settings = settings_for(workspace)
    rows = read_answers(str(answer(settings)))
    retriever = open_retriever(settings)
    queries = [f"What is the code of vessel{number}?" for number in range(40)]
    found = retriever.retrieve_passages(queries, settings.retrieval.top_k)
    model = weights.resolve(settings.generator.model)
    tasks = [
        Task(schema.Query(f"q{n}", text, None, (), (), "all"), tuple(passages), tuple(scores), "000001")
        for n, (text, (passages, scores)) in enumerate(zip(queries, found, strict=True))
    ]
    expected = answer_tasks(tasks, load_generator(settings.generator, model.directory), settings, model.fingerprint)

    def essence(row: schema.Answer) -> tuple[object, ...]:
        return (
            row.query_id,
            row.answer,
            row.passage_ids,
            row.scores,
            row.citations,
            row.status,
            row.index_version,
            row.model,
        )

    assert [essence(row) for row in rows] == [essence(row) for row in expected]
    assert all(row.prompt_tokens > 0 and row.completion_tokens > 0 for row in rows)


def test_the_base_arm_shows_no_passages_and_needs_no_index(tmp_path: Path, settings_for) -> None:
    rows = read_answers(str(answer(settings_for(tmp_path, "answer.arm=base", "queries.limit=9"))))
    assert [row.query_id for row in rows] == [f"q{number}" for number in range(9)]
    assert {row.passage_ids for row in rows} == {()}
    assert {row.index_version for row in rows} == {""}


def test_a_question_beyond_the_token_budget_becomes_a_failed_row(workspace: Path, tmp_path: Path, settings_for) -> None:
    path = tmp_path / "queries.jsonl"
    rows = [{"query_id": f"q{n}", "text": "Why? " * (900 if n == 3 else 1)} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = read_answers(str(answer(settings_for(workspace, f"queries.path={path}"))))
    assert [row.query_id for row in answers] == [f"q{n}" for n in range(12)]
    assert [row.query_id for row in answers if row.status == "failed"] == ["q3"]
    assert "prompt.max_tokens" in answers[3].error


def test_a_finished_run_is_reused_and_another_config_runs_again(
    workspace: Path, settings_for, capsys: pytest.CaptureFixture[str]
) -> None:
    first = answer(settings_for(workspace, "queries.limit=8"))
    capsys.readouterr()
    assert answer(settings_for(workspace, "queries.limit=8")) == first
    assert "already finished" in capsys.readouterr().err
    assert answer(settings_for(workspace, "queries.limit=8", "retrieval.top_k=2")) != first
    assert not list((workspace / "runs" / ".work").glob("answer-*"))


def test_a_failing_server_fails_the_job_and_the_next_run_retries(workspace: Path, settings_for, openai_stub) -> None:
    down = [
        "generator.engine=openai",
        "generator.model=stub",
        "generator.max_attempts=1",
        f"generator.base_url={openai_stub.url}",
        "queries.limit=16",
    ]
    openai_stub.status = 500
    with pytest.raises(AnswerError, match=r"16 of 16 rows failed.*only failed units are repeated"):
        answer(settings_for(workspace, *down))
    openai_stub.status = 200
    rows = read_answers(str(answer(settings_for(workspace, *down))))
    assert [row.status for row in rows] == ["ok"] * 16
    assert {row.answer for row in rows} == {"forty-two"}
    assert rows[0].citations[0].passage_id == rows[0].passage_ids[0], "the stub's answer ends in [1]"


def test_arms_are_scored_and_compared_on_the_same_queries(workspace: Path, settings_for) -> None:
    run = Path(evaluate(settings_for(workspace, "queries.limit=12")))
    manifest = artifacts.read_manifest(str(run))
    assert list(manifest["runs"]) == ["base", "rag"]
    for arm in ("base", "rag"):
        summary = json.loads((run / arm / "metrics.json").read_text())
        table = pq.read_table(run / arm / "scores.parquet")
        assert table.num_rows == 12
        for name in ("EM", "token_F1", "contains_answer", "failed"):
            assert summary[name]["value"] == pytest.approx(sum(table[name].to_pylist()) / 12)
    differences = json.loads((run / "differences.json").read_text())["rag - base"]
    rag = json.loads((run / "rag" / "metrics.json").read_text())
    base = json.loads((run / "base" / "metrics.json").read_text())
    assert differences["token_F1"]["value"] == pytest.approx(rag["token_F1"]["value"] - base["token_F1"]["value"])
    assert all(len(line) <= 80 for line in evaluation_lines(str(run), 2))
