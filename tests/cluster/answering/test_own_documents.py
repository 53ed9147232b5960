"""Queries that are documents of their own corpus, as in BEIR: no hits of themselves, whole or in shards. In this process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import runs, session, staged_queries
from ragtune_ray.cluster.answering.passages import Found, Shown
from ragtune_ray.cluster.answering.sharded import CountUnit, EncodeUnit, Job, MergeUnit, SearchUnit
from ragtune_ray.cluster.answering.workers import RetrieveUnit
from ragtune_ray.cluster.comparing import variants
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.indexing.update import upsert_documents
from ragtune_ray.cluster.training.example_workers import PrepareUnit
from ragtune_ray.cluster.tuning import rounds
from ragtune_ray.index import snapshot, versions
from ragtune_ray.index.retriever import OWN_PASSAGES
from ragtune_ray.models.arms import Pair
from ragtune_ray.tuning.ledger import Ledger

TOPICS = ("salt", "walnut", "velvet", "copper", "amber", "linen")


def rows(start: int, stop: int) -> list[dict[str, str]]:
    return [
        {"_id": f"a{n}", "text": f"Vessel {n} carries {TOPICS[n % 6]} and {TOPICS[n % 5]}."} for n in range(start, stop)
    ]


def write(path: Path, values: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Config:
    """Each argument is a query; the one after the next is relevant to it."""
    monkeypatch.setattr(session, "use_one_thread", lambda: None)
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", rows(0, 40))
    write(folder / "queries.jsonl", rows(0, 20))
    lines = ["query-id\tcorpus-id\tscore", *(f"a{n}\ta{n + 2}\t1" for n in range(20))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    built = config.Config().using(
        f"workspace={tmp_path / 'workspace'}", f"corpus.path={folder}", f"queries.path={folder}",
        "encoder.model=hashing-64", "retrieval.candidates=6",
    )  # fmt: skip
    build_index(built)
    upsert_documents(built, str(write(tmp_path / "more.jsonl", rows(40, 60))))
    return built


def work(worker: Any, units: list[dict[str, Any]]) -> None:
    for unit in units:
        worker({"unit": np.array([json.dumps(unit)])})


def test_the_query_itself_is_no_hit_whole_or_in_shards(settings: config.Config, tmp_path: Path) -> None:
    name = versions.current_version(settings.workspace)
    shards = snapshot.shards(settings.workspace, versions.read_version(settings.workspace, name), 1)
    assert len(shards) == 2
    with staged_queries.staged_queries(settings) as staged:
        assert staged.stand_in_corpus
        units = staged_queries.units(staged, 8)
        whole = tmp_path / "whole"
        work(RetrieveUnit(settings, name, staged.url, 5, str(whole), leave_out_own=True), units)
        places, folder = tuple(map(tuple, shards)), str(tmp_path / "work")
        job = Job(settings, name, staged.url, len(units), 5, places, folder, f"{folder}/hits", OWN_PASSAGES)
        pairs = [
            {**unit, "unit": job.search_unit(shard, unit["unit"]), "queries": unit["unit"], "shard": shard}
            for shard in range(2)
            for unit in units
        ]
        for kind, given in (
            (EncodeUnit, units), (CountUnit, [{"unit": 0}, {"unit": 1}]), (SearchUnit, pairs), (MergeUnit, units)
        ):  # fmt: skip
            work(kind(job), given)
    found, merged = (
        pa.concat_tables([pq.read_table(path) for path in sorted(Path(folder).glob("*.hits.parquet"))])
        for folder in (whole, job.hits)
    )
    assert found == merged
    assert found.num_rows == 20 * 5
    assert not any(hit["query_id"] == hit["document_id"] for hit in found.to_pylist())


def test_the_query_itself_is_no_hard_negative(settings: config.Config, tmp_path: Path) -> None:
    training = settings.using(
        "training.objective=contrastive", "training.hard_negatives=6", "training.negative_depth=8"
    )
    name = versions.current_version(settings.workspace)
    with staged_queries.staged_queries(training) as staged:
        units, found, shown = staged_queries.units(staged, 20), str(tmp_path / "found"), Shown(gold=True, vectors=True)
        work(RetrieveUnit(training, name, staged.url, 8, found, leave_out_own=True, shown=shown), units)
        given = Found(found, found, len(units), 20)
        work(PrepareUnit(training, name, staged.url, "train", str(tmp_path / "examples"), found=given), units)
    (path,) = (tmp_path / "examples").glob("*.examples.parquet")
    made = pq.read_table(path).to_pylist()
    assert made
    for example in made:
        assert f"{example['query_id']}#0" not in example["passage_ids"]


def test_only_beir_folders_are_treated_so_and_it_is_part_of_the_identity(
    settings: config.Config, tmp_path: Path
) -> None:
    _, manifest = runs.index_version(settings)
    with staged_queries.staged_queries(settings) as staged:
        assert runs.inputs_identity(settings, staged, manifest)["own_documents"] == "left out"
    file = write(tmp_path / "questions.jsonl", [{"id": "a1", "question": "Which vessel?"}])
    plain = settings.using(f"queries.path={file}")
    with staged_queries.staged_queries(plain) as staged:
        assert not staged.stand_in_corpus
        assert "own_documents" not in runs.inputs_identity(plain, staged, manifest)


def test_a_copy_of_the_queries_is_treated_as_they_are(settings: config.Config, tmp_path: Path) -> None:
    _, manifest = runs.index_version(settings)
    file = str(write(tmp_path / "copy.jsonl", rows(0, 20)))
    for given, expected in ((settings, True), (settings.using("queries.own_documents=keep"), False)):
        copied = staged_queries.with_all_queries_of(given, file).with_values(
            staged_queries.own_documents_setting(given)
        )
        with staged_queries.staged_queries(copied) as staged, staged_queries.staged_queries(given) as original:
            assert staged.stand_in_corpus is original.stand_in_corpus is expected
            assert ("own_documents" in runs.inputs_identity(copied, staged, manifest)) is expected
    probe = staged_queries.with_all_queries_of(settings.using("queries.own_documents=leave_out"), file)
    with staged_queries.staged_queries(probe) as staged:
        assert not staged.stand_in_corpus, "another file says itself what its ids mean"


def test_variants_and_rounds_leave_out_own_documents_as_the_queries_do(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def answered(asked: config.Config) -> str:
        with staged_queries.staged_queries(asked) as staged:
            seen.append(staged.stand_in_corpus)
        return "run"

    monkeypatch.setattr(variants.answer, "answer", answered)
    monkeypatch.setattr(variants.evaluate, "read_answers", lambda _: [])
    monkeypatch.setattr(variants.evaluate, "scores_of", lambda *_: {"a1": {settings.compare.metric: 1.0}})
    question = schema.Query("a1", "Vessel?", ("salt",), ("a3",), (1.0,), "validation")
    assert variants._scores(settings, settings, [question]) == [1.0]
    monkeypatch.setattr(rounds.judging, "queries_of", lambda *_: [question])
    ledger = Ledger(str(tmp_path / "ledger.jsonl"))
    tuned = rounds.Rounds(settings, str(tmp_path / "tune"), ledger, Pair.of(settings), progress.Stages("tune", {}))
    answered(tuned.settings_for(tuned.write_questions("questions", [question])))
    assert seen == [True, True]
