"""A workspace that an earlier commit wrote opens, answers, updates and rolls back; the same commands give the same identities.

`tests/data/golden/workspace` was written by commit 7c4e917 with a two-layer generator and the hashing encoder:
`index`, `index upsert new.jsonl`, `index delete d5`, `retrieve` and `compare` of its `ragtune.yaml`. Rank fusion was the only
fusion then, BM25 had no titles, and questions about missing documents were kept, so a config that says so finds its runs.
"""

import json
import shutil
from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.asking import ask_streaming
from ragtune_ray.cluster.answering.answer import answer
from ragtune_ray.cluster.answering.evaluate import evaluate, read_answers
from ragtune_ray.cluster.answering.retrieve import retrieve
from ragtune_ray.cluster.comparing.compare import compare
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.indexing.update import delete_documents, upsert_documents
from ragtune_ray.cluster.training.train import train
from ragtune_ray.evaluation.comparison import Comparison
from ragtune_ray.index import versions
from ragtune_ray.index.retriever import open_retriever
from ragtune_ray.index.verification import verify_workspace
from ragtune_ray.models import arms
from ragtune_ray.storage import artifacts

GOLDEN = Path(__file__).parent / "data" / "golden" / "workspace"
COMMAND = "ragtune compare ragtune.yaml"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Config:
    """The config of the old workspace, in a copy of its folder; paths in it are relative."""
    shutil.copytree(GOLDEN, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return config.load(
        "ragtune.yaml", ["retrieval.fusion=ranks", "index.lexical_titles=false", "queries.unindexed=keep"]
    )


def run_name(kind: str) -> str:
    (path,) = (GOLDEN / "workspace" / "runs").glob(f"{kind}-[0-9a-f]*")
    return f"workspace/runs/{path.name}"


def passages_of(text: str) -> list[str]:
    """The passage ids of `run.trec`, query by query, in the order of their ranks."""
    return [line.split()[2] for line in text.splitlines()]


def test_every_file_of_the_old_workspace_is_sound(settings: config.Config) -> None:
    problems, checked = verify_workspace(settings.workspace)
    assert problems == []
    assert checked == 13


def test_finished_runs_of_the_old_workspace_are_found_again(settings: config.Config) -> None:
    """A run's directory is named by all that decides its rows, so an equal name shows an equal identity."""
    settings = settings.using("evaluate.normalization=squad")  # the only way to score at that commit
    before = {path: path.stat().st_mtime_ns for path in Path("workspace/runs").rglob("*") if path.is_file()}
    assert str(retrieve(settings)) == run_name("retrieve")
    for arm in ("base", "rag", "rag+ft"):
        assert str(answer(settings.with_values({"answer.arm": arm}))) == run_name(f"answer-{arm}")
    settings = settings.using("compare.cost_margin=0")  # every difference of costs counted
    compared = settings.with_values({"evaluate.arms": settings.compare.arms})
    assert str(evaluate(compared)) == run_name("evaluate")
    assert str(compare(settings, COMMAND)) == run_name("compare")
    (model,) = (path.name for path in (GOLDEN / "workspace/models/rag+ft").iterdir() if path.is_dir())
    assert str(train(settings)).endswith(f"models/rag+ft/{model}")
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing was computed again"


def test_old_answers_are_scored_again_by_the_stricter_default(settings: config.Config) -> None:
    arms = {"evaluate.arms": settings.compare.arms}
    evaluated = evaluate(settings.with_values(arms))
    assert evaluated.path != run_name("evaluate"), "other scores have another identity"
    assert set(evaluated.manifest["runs"].values()) == {run_name(f"answer-{arm}") for arm in settings.compare.arms}
    old = evaluate(settings.with_values({**arms, "evaluate.normalization": "squad"})).metrics
    for arm, metrics in evaluated.metrics.items():
        assert {name: metrics[name] for name in old[arm]} == old[arm], "these answers have no numbers"
        assert set(metrics) - set(old[arm]) == {"ROUGE_L"}, "which the old run does not have"
    newer = {**arms, "evaluate.normalization": "squad", "compare.metric": "ROUGE_L"}
    assert all("ROUGE_L" in metrics for metrics in evaluate(settings.with_values(newer)).metrics.values())


def test_the_old_comparison_reads_back_to_the_same_json(settings: config.Config) -> None:
    path = Path(run_name("compare")) / "comparison.json"
    found = Comparison.model_validate_json(path.read_text(encoding="utf-8"))
    dumped, written = (
        json.loads(found.model_dump_json(exclude_unset=True)),
        json.loads(path.read_text(encoding="utf-8")),
    )
    assert set(dumped) == set(written)
    assert dumped["verdict"] == written["verdict"]
    assert dumped["arms"] == written["arms"]


def test_the_old_index_finds_what_it_found(settings: config.Config) -> None:
    rows = [json.loads(line) for line in Path("queries.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row["text"] for row in rows if row["split"] == "test"]
    found = open_retriever(settings).retrieve([str(number) for number in range(len(texts))], texts, 20)
    ids = [hit.passage_id for hits in found for hit in hits]
    assert ids == passages_of((Path(run_name("retrieve")) / "run.trec").read_text(encoding="utf-8"))


def test_the_corpus_is_indexed_to_the_same_bytes(settings: config.Config) -> None:
    """Under another name, a digest of what decides its content: files are read in a newer way (`versions.READING_FORMAT`)."""
    build_index(settings.with_values({"workspace": "new"}))
    (name,) = (path.name for path in Path("new/index/segments").iterdir())
    (entry,) = versions.read_version(settings.workspace, "000001").entries
    old, new = Path("workspace/index/segments", entry.segment_id), Path("new/index/segments", name)
    files = {path.relative_to(new) for path in new.rglob("*") if path.is_file()}
    assert files == {path.relative_to(old) for path in old.rglob("*") if path.is_file()}
    assert [
        file for file in files - {Path("manifest.json")} if (new / file).read_bytes() != (old / file).read_bytes()
    ] == []
    manifests = [artifacts.read_manifest(str(folder)) for folder in (old, new)]
    assert manifests[0]["files"] == manifests[1]["files"]


@pytest.mark.parametrize("arm", ["base", "rag", "rag+ft"])
def test_a_question_is_answered_from_the_old_workspace_with_the_same_text(settings: config.Config, arm: str) -> None:
    old = read_answers(run_name(f"answer-{arm}"))[0]
    tuned = arms.with_tuned_models(settings.with_values({"answer.arm": arm}))
    *pieces, asked = ask_streaming(tuned, old.query)
    text = old.answer.rstrip("\N{REPLACEMENT CHARACTER}")  # a character that was cut is now left out
    assert asked.answer.answer == text
    assert "".join(pieces) == text
    assert (old.cut, asked.answer.cut) == (None, True)
    assert asked.answer.passage_ids == old.passage_ids


def test_the_old_index_is_updated_and_rolled_back(settings: config.Config) -> None:
    workspace = settings.workspace
    assert versions.current_version(workspace) == "000003"
    old = versions.read_version(workspace, "000003")
    Path("more.jsonl").write_text(
        '{"document_id": "n2", "text": "A freighter of velvet and walnut."}\n', encoding="utf-8"
    )
    upsert_documents(settings, "more.jsonl")
    assert "n2" in {hit.document_id for hit in open_retriever(settings).retrieve(["1"], ["freighter of velvet"], 1)[0]}
    delete_documents(settings, ["n1"])
    assert versions.list_versions(workspace) == [f"{number:06}" for number in range(1, 6)]
    assert versions.roll_back(workspace, "000003").name == "000006"
    assert versions.read_version(workspace, "000006").content_id == old.content_id
