"""`ragtune tune` with the real verbs on a Ray cluster, with tiny models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster.answering import answer, evaluate
from ragtune_ray.cluster.answering.retrieve import retrieve
from ragtune_ray.cluster.comparing import compare, freshness
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.training import prepare
from ragtune_ray.cluster.tuning import judging, tune
from ragtune_ray.cluster.tuning.judging import reciprocal_ranks
from ragtune_ray.cluster.tuning.rounds import Rounds
from ragtune_ray.index import versions
from ragtune_ray.ingest import splits
from ragtune_ray.models import arms, weights
from ragtune_ray.storage import artifacts, filesystem
from ragtune_ray.training import teaching
from ragtune_ray.tuning.ledger import Ledger
from tests.support.corpora import WORDS, write_corpus, write_queries

pytestmark = [pytest.mark.timeout(1500), pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("shared_ray")]

SPLITS = ["train"] * 32 + ["validation"] * 24 + ["test"] * 4


@pytest.fixture(scope="module")
def given(settings_for, encoder_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """60 documents with the same one-word answer, which a tiny generator can learn, and their index."""
    folder = tmp_path_factory.mktemp("tuning")
    source = np.random.default_rng(0)
    with (folder / "corpus.jsonl").open("w") as corpus, (folder / "queries.jsonl").open("w") as queries:
        for number, split in enumerate(SPLITS):
            text = f"{' '.join(source.choice(WORDS, 6)).capitalize()}. The code of vessel{number} is ok."
            corpus.write(json.dumps({"document_id": f"d{number}", "title": f"V{number}", "text": text}) + "\n")
            row = {"query_id": f"q{number}", "text": f"What is the code of vessel{number}?", "answers": ["ok"]}
            queries.write(json.dumps({**row, "document_ids": [f"d{number}"], "split": split}) + "\n")
    settings: config.Config = settings_for(
        folder / "workspace",
        f"corpus.path={folder / 'corpus.jsonl'}",
        f"queries.path={folder / 'queries.jsonl'}",
        f"encoder.model={encoder_directory}",
        "encoder.precision=float32",
        "chunking.size_tokens=128",
        "retrieval.top_k=1",
        "generator.max_new_tokens=3",
        "prompt.max_tokens=600",
        "prompt.system=Answer.",
        "prompt.system_without_passages=Answer.",
        "cluster.encoder_workers=1",
        "cluster.generator_workers=1",
        "training.batch_examples=8",
        "training.max_tokens=700",
        "training.precision=float32",
        "training.learning_rate=0.01",
        "training.epochs=10",
        "training.evaluate_steps=20",
        "training.cite=false",
        "training.gold_left_out_share=0",
        "training.negative_margin=0",
        "compare.metric=EM",
        "compare.latency_queries=1",
    )
    build_index(settings)
    return settings


def test_staged_accepts_a_better_generator_and_compare_uses_it(given: config.Config) -> None:
    settings = given.using("tune.mode=staged", "tune.components=[generator]")
    url = tune.tune(settings).path
    (judged,) = [
        json.loads(line) for line in (Path(url) / "ledger.jsonl").read_text().splitlines() if '"accepted"' in line
    ]
    assert judged["accepted"], judged
    assert (judged["before"], judged["metric"]) == (0.0, "EM")
    found = compare.read_comparison(compare.compare(settings.using("compare.arms=[rag, staged]")))
    assert list(found["arms"]) == ["rag", "staged"]
    assert found["arms"]["staged"]["quality"]["EM"]["value"] > found["arms"]["rag"]["quality"]["EM"]["value"]
    assert found["arms"]["staged"]["cost"]["training"] > 0
    rows = evaluate.read_answers(str(answer.answer(settings.using("answer.arm=staged", "queries.split=test"))))
    assert {row.model for row in rows} == {weights.resolve(judged["pair"]["generator_model"]).fingerprint}
    assert tune.tune(settings).path == url


@pytest.mark.long
def test_joint_in_the_loop_trains_both_and_judges_each(given: config.Config) -> None:
    settings = given.using(
        "tune.mode=joint", "tune.in_loop=true", "tune.rounds=1", "tune.candidates=3", "training.max_steps=40",
        "training.evaluate_steps=10",
    )  # fmt: skip
    url = tune.tune(settings).path
    rows = [json.loads(line) for line in (Path(url) / "ledger.jsonl").read_text().splitlines()]
    (trained,) = [row for row in rows if row["step"] == "retriever and generator trained"]
    for model, objective in ((trained["query_model"], "retriever"), (trained["model"], "generator")):
        manifest = artifacts.read_manifest(model)
        assert manifest["objective"] == "joint", objective
        assert manifest["best"]["loss"] < manifest["start"]["loss"]
    judged = {row["component"]: row for row in rows if "accepted" in row}
    assert list(judged) == ["retriever", "generator"]
    assert judged["generator"]["accepted"], judged
    assert judged["generator"]["pair"]["generator_model"] == trained["model"]
    assert tune.report_lines(url)
    assert tune.tune(settings).path == url


@pytest.mark.long
def test_a_new_encoders_index_refuses_other_encoders(given: config.Config, tmp_path: Path) -> None:
    from ragtune_ray.index.retriever import open_retriever

    settings = given.using(
        "tune.reindex=true", "training.max_steps=16", "training.evaluate_steps=4", "tune.retriever_learning_rate=0.003",
        "training.hard_negatives=2", "queries.split=all",
    )  # fmt: skip
    start = arms.Pair.of(settings)
    rounds = Rounds(
        settings, str(tmp_path / "rounds"), Ledger(str(tmp_path / "ledger.jsonl")), start, progress.Stages("tune", {})
    )
    learnt = judging.queries_of(settings, "train")
    accepted = rounds.tune_retriever(rounds.write_questions("questions", learnt), len(learnt), taught=False)
    (judged,) = [row for row in rounds.ledger.rows if "pair" in row]
    assert judged["num_examples"] == len(learnt)
    changed = arms.Pair(**judged["pair"])
    assert rounds.pair == (changed if accepted else start)
    assert changed.workspace != start.workspace
    for pair in (start, changed):
        assert open_retriever(pair.used_in(settings)).search_ordinals(["vessel1"], 1)[1].shape == (1, 1)
    for mixed in (
        arms.Pair(start.workspace, changed.encoder_model, "", start.generator_model),
        arms.Pair(changed.workspace, start.encoder_model, "", start.generator_model),
    ):
        with pytest.raises(artifacts.ArtifactError, match="was built by encoder"):
            open_retriever(mixed.used_in(settings))

    # A comparison of changed documents changes a copy of each index, with the encoder that built it.
    published = filesystem.join(settings.workspace, "models", "domain", "d0")
    artifacts.publish(artifacts.stage(published), published, "tuned", pair=changed.facts())
    artifacts.make_current(filesystem.join(settings.workspace, "models", "domain"), "d0")
    write_corpus(tmp_path / "changes.jsonl", 4, seed=9)
    write_queries(tmp_path / "changed.jsonl", 4)
    indexes = compare._indexes(
        settings.using(
            "compare.arms=[base,rag,domain]",
            f"compare.changes_path={tmp_path / 'changes.jsonl'}",
            f"compare.changed_queries_path={tmp_path / 'changed.jsonl'}",
        )
    )
    assert set(indexes) == {start.workspace, changed.workspace}
    for of_arm in indexes.values():
        copy, seconds = freshness.follow_changes(of_arm)
        assert seconds > 0
        assert versions.current_version(copy.workspace) != versions.current_version(of_arm.workspace)
        assert copy.encoder.model == of_arm.encoder.model
        freshness.remove_copy(of_arm)
        assert not filesystem.exists(copy.workspace)


def test_bulk_teaching_equals_teaching_in_process(given: config.Config) -> None:
    from ragtune_ray.generation.generator import load_generator
    from ragtune_ray.index.retriever import encode_queries, open_retriever
    from ragtune_ray.models.encoder import load_token_counter
    from ragtune_ray.training.examples import Candidates, holds_answer

    settings = given.using(
        "training.objective=query_side", "training.teacher=generator", "training.hard_negatives=3",
        "training.negative_depth=12", "generator.batch_tokens=4096",
    )  # fmt: skip
    url = prepare.prepare(settings)
    bulk = {row.query_id: row for row in _examples(url)}
    retriever = open_retriever(settings, device="cpu")
    asked = settings.queries.model_copy(update={"split": "train"})
    rows = [row for row in splits.selected_queries(asked) if isinstance(row, schema.Query)]
    texts = [row.text for row in rows]
    scores, ordinals = retriever.search_ordinals(texts, 12)
    embedded = encode_queries(retriever.encoder, texts)
    counter = load_token_counter(settings.encoder)

    def count(given_texts: Sequence[str]) -> list[int]:
        return [min(len(spans), counter.max_tokens) for spans in counter.token_spans(list(given_texts))]

    generator = load_generator(settings.generator, weights.resolve(settings.generator.model).directory)
    expected: dict[str, Any] = {}
    judgements = []
    for number, row in enumerate(rows):
        hits = ordinals[number]
        cosines = retriever.index.vectors.take(hits) @ embedded[number]
        found = Candidates(
            (), tuple(retriever.index.take(hits.tolist())), tuple(scores[number].tolist()), (), tuple(cosines.tolist())
        )
        chosen = teaching.choose_candidates(row, found, 4)
        (gains,) = teaching.passage_gains([(row, chosen)], generator, settings)
        assert not isinstance(gains, str)
        example, judgement = teaching.taught_example(row, found, chosen, gains, settings, count)
        judgements.append(judgement)
        if isinstance(example, schema.RetrieverExample):
            expected[row.query_id] = example
    assert bulk.keys() == expected.keys()
    for name, example in expected.items():
        assert bulk[name].passage_ids == example.passage_ids
        assert bulk[name].teacher_scores == pytest.approx(example.teacher_scores, abs=1e-4)
    facts, here = artifacts.read_manifest(url)["teacher"], teaching.teacher_facts(judgements)
    assert {name: pytest.approx(value, abs=1e-3) for name, value in facts.items()} == here
    answers = {row.query_id: row.answers or () for row in judging.queries_of(settings, "validation")}
    validation = _examples(url, prepare.VALIDATION)
    assert validation
    for example in validation:
        assert holds_answer(example.passages[0], answers[example.query_id])
        assert example.teacher_scores == (), "validation needs no teacher"


def test_the_retriever_is_judged_as_retrieve_scores_it(given: config.Config) -> None:
    judged = reciprocal_ranks(given.using("queries.split=test"))
    run = retrieve(given.using("queries.split=test", "evaluate.depth=10"))
    found = json.loads((Path(str(run)) / "metrics.json").read_text())["MRR@10"]
    assert np.mean(list(judged.values())) == pytest.approx(found["value"])


def _examples(url: str, name: str = prepare.TRAIN) -> list[schema.RetrieverExample]:
    import pyarrow.parquet as pq

    table = pq.read_table(artifacts.open_artifact(url, "examples").path / name)
    return list(schema.from_table(table, schema.RetrieverExample))
