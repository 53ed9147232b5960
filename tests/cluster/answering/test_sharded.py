"""Retrieval from an index in shards: the same hits as from the whole, also after deletions, with filters and after interruptions."""

import dataclasses
import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragtune_ray import config, schema
from ragtune_ray.cluster import runs, session, staged_queries
from ragtune_ray.cluster.answering import finding
from ragtune_ray.cluster.answering.retrieve import retrieve
from ragtune_ray.cluster.answering.sharded import CountUnit, EncodeUnit, Job, MergeUnit, SearchUnit
from ragtune_ray.cluster.answering.workers import RetrieveUnit
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.indexing.update import delete_documents, upsert_documents
from ragtune_ray.index import retriever, snapshot, versions
from ragtune_ray.storage import artifacts, filesystem

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]

Settings = Callable[..., config.Config]
SHARDED = "cluster.shard_bytes=1"


@pytest.fixture(scope="module")
def changed_corpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The corpus with metadata and with copies of one text, and documents to replace and add to it."""
    folder = tmp_path_factory.mktemp("changed")
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    rows = [{**row, "metadata": {"parity": number % 2, "team": "ab"[number % 2]}} for number, row in enumerate(rows)]
    # Equal texts far apart have equal scores: which of them comes first must not depend on shards.
    copies = [{**rows[5], "document_id": f"copy{number}"} for number in range(3)]
    base, changes = folder / "base.jsonl", folder / "changes.jsonl"
    base.write_text("".join(json.dumps(row) + "\n" for row in [*copies[:1], *rows, *copies[1:]]))
    new = [{**rows[number], "text": f"{rows[number]['text']} It was repainted."} for number in (1, 20, 33)]
    added = {**rows[5], "document_id": "copy3"}
    changes.write_text("".join(json.dumps(row) + "\n" for row in [*new, added]))
    return base, changes


def build(settings: config.Config, changes: Path) -> None:
    """Several segments with deleted and replaced passages."""
    build_index(settings)
    delete_documents(settings, ["d2", "d3", "d30", "d59"])
    upsert_documents(settings, str(changes))


@pytest.fixture(scope="module")
def settings_of(
    tmp_path_factory: pytest.TempPathFactory,
    settings_for: Settings,
    changed_corpus: tuple[Path, Path],
    shared_ray: None,
) -> Settings:
    """A function from overrides to a config, on one index of many segments."""
    workspace = tmp_path_factory.mktemp("scatter")
    base, changes = changed_corpus

    def settings(*overrides: str) -> config.Config:
        # Some documents that questions name were deleted; their questions are asked all the same.
        given = (f"corpus.path={base}", "index.segment_passages=32", "queries.unindexed=keep")
        return settings_for(workspace, *given, *overrides)

    build(settings(), changes)
    version = versions.read_version(str(workspace), versions.current_version(str(workspace)))
    assert len(version.entries) > 5
    assert sum(entry.num_deleted > 0 for entry in version.entries) > 2
    return settings


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "UNIT_QUERIES", 16)


def run(settings: config.Config) -> dict[str, object]:
    """What a run holds; the run itself is removed, as one whose hits are equal has the same name."""
    path = Path(retrieve(settings))
    manifest = artifacts.read_manifest(str(path))
    scores = path / "scores.parquet"
    found = {
        "hits": pq.read_table(path / "hits.parquet"),
        "scores": pq.read_table(scores) if scores.exists() else None,
        "trec": (path / "run.trec").read_bytes(),
        "rejects": (path / "rejects.jsonl").read_text(),
        "num_shards": manifest["num_shards"],
        "num_hits": manifest["num_hits"],
    }
    shutil.rmtree(path)
    return found


@pytest.mark.parametrize(
    ("mode", "filtered"),
    [
        ("dense", ""),
        ("lexical", ""),
        ("hybrid", "retrieval.filter={parity: 1}"),
        ("hybrid", "retrieval.fusion=ranks"),
    ],
)
def test_a_run_over_shards_equals_a_run_over_the_whole(settings_of: Settings, mode: str, filtered: str) -> None:
    settings = settings_of(f"retrieval.mode={mode}", "retrieval.candidates=12", *filter(None, [filtered]))
    whole, sharded = run(settings), run(settings.using(SHARDED))
    assert whole.pop("num_shards") == 1
    assert sharded.pop("num_shards") > 5  # type: ignore[operator]
    assert whole["num_hits"]
    assert whole == sharded


def stages_in_process(job: Job, units: list[dict[str, Any]]) -> None:
    """All stages in this process, each by one worker."""
    pairs = [
        {**unit, "unit": job.search_unit(shard, unit["unit"]), "queries": unit["unit"], "shard": shard}
        for shard in range(len(job.shards))
        for unit in units
    ]
    shards = [{"unit": number} for number in range(len(job.shards))]
    for kind, given in ((EncodeUnit, units), (CountUnit, shards), (SearchUnit, pairs), (MergeUnit, units)):
        if kind is not CountUnit or job.mode != "dense":
            work(kind(job), given)


def work(worker: Any, units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(worker({"unit": np.array([json.dumps(unit)])})["summary"][0]) for unit in units]


def committed(directory: Path) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The hits and the rejects of all units of a stage, in order."""
    tables = [pq.read_table(path) for path in sorted(directory.glob("*.hits.parquet"))]
    rejects = [row for path in sorted(directory.glob("*.json")) for row in json.loads(path.read_text())["rejects"]]
    return pa.concat_tables(tables), rejects


@pytest.fixture
def job_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A function from a config to the job that `retrieve` would make of it, every segment a shard, and its units."""
    monkeypatch.setattr(session, "use_one_thread", lambda: None)

    def make(
        settings: config.Config, staged: staged_queries.StagedQueries, searches: str = ""
    ) -> tuple[Job, list[dict[str, Any]]]:
        version = versions.current_version(settings.workspace)
        shards = snapshot.shards(settings.workspace, versions.read_version(settings.workspace, version), 1)
        assert len(shards) > 2
        units = staged_queries.units(staged, 16)
        places, work = tuple(map(tuple, shards)), str(tmp_path / "work")
        hits, fuses = f"{work}/hits", bool(searches)
        return Job(settings, version, staged.url, len(units), 9, places, work, hits, 0, searches, fuses), units

    return make


@pytest.fixture
def whole_and_sharded(job_of, tmp_path: Path):
    """A function from a config to what the workers of plain retrieval commit, and those of the stages; in this process."""

    def both(settings: config.Config, searches: str = "") -> list[tuple[pa.Table, list[dict[str, Any]]]]:
        with staged_queries.staged_queries(settings) as staged:
            job, units = job_of(settings, staged, searches)
            stages_in_process(job, units)
            whole = str(tmp_path / "whole")
            work(RetrieveUnit(settings, job.version, staged.url, job.top_k, whole, searches=searches), units)
        return [committed(tmp_path / "whole"), committed(Path(job.hits))]

    return both


def test_split_questions_find_the_same_in_shards(settings_of: Settings, whole_and_sharded, tmp_path: Path) -> None:
    """Every third question is searched with two more texts, whose hits are fused after the shards are merged."""
    settings = settings_of("retrieval.candidates=12", "retrieval.decompose=true")
    asked = [
        schema.Searches(row.query_id, row.text, (row.text, *(("vessel7", f"code {n}") if n % 3 == 0 else ())))
        for n, row in enumerate(staged_queries.selected_queries(settings))
    ]
    path = tmp_path / "searches.parquet"
    pq.write_table(schema.to_table(asked, schema.Searches), path)
    whole, sharded = whole_and_sharded(settings, str(path))
    assert whole == sharded
    first = whole[0].slice(0, 9).to_pylist()
    assert [row["rank"] for row in first] == list(range(1, 10))
    assert first[0]["score"] > 2 / (1 + settings.retrieval.fusion_constant + 12), "fused by reciprocal rank"


@pytest.mark.parametrize("filtered", ["", "retrieval.filter={parity: 1}"])
@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_hits_from_shards_equal_those_from_the_whole(
    settings_of: Settings, whole_and_sharded, mode: str, filtered: str
) -> None:
    whole, sharded = whole_and_sharded(
        settings_of(f"retrieval.mode={mode}", "retrieval.candidates=12", *filter(None, [filtered]))
    )
    assert whole == sharded
    assert whole[0].num_rows == 40 * 9 or mode == "lexical"
    documents = set(whole[0]["document_id"].to_pylist())
    assert not documents & {"d2", "d3", "d30", "d59"}
    if filtered:
        assert all(int(name[1:]) % 2 for name in documents if name.startswith("d"))
    else:
        assert {"copy0", "copy1", "copy2", "copy3"} <= documents, "equal scores are among the hits"


def test_each_tenant_finds_its_own_in_shards_too(settings_of: Settings, whole_and_sharded) -> None:
    whole, sharded = whole_and_sharded(settings_of("index.tenant_field=team", "retrieval.tenant=a"))
    assert whole == sharded
    names = [name for name in whole[0]["document_id"].to_pylist() if name.startswith("d")]
    assert names
    assert not any(int(name[1:]) % 2 for name in names)


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_a_query_that_cannot_be_encoded_becomes_a_reject(
    tmp_path: Path,
    settings_for: Settings,
    changed_corpus: tuple[Path, Path],
    nan_encoder: Path,
    whole_and_sharded,
    mode: str,
) -> None:
    base, _ = changed_corpus
    asked = tmp_path / "queries.jsonl"
    rows = [{"query_id": f"q{n}", "text": f"code of vessel{n}{'?' if n % 7 == 3 else ''}"} for n in range(40)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings_for(
        tmp_path / "workspace",
        f"corpus.path={base}",
        f"queries.path={asked}",
        f"encoder.model={nan_encoder}",
        "index.segment_passages=64",
        f"retrieval.mode={mode}",
    )
    build_index(settings)
    whole, sharded = whole_and_sharded(settings)
    assert whole == sharded
    assert [reject["place"] for reject in whole[1]] == [f"q{n}" for n in range(40) if n % 7 == 3]
    assert "no finite vector" in whole[1][0]["reason"]


@pytest.mark.parametrize(("kind", "equal"), [("ivf", True), ("hnsw", True), ("ivf_sq", False), ("ivf_pq", False)])
def test_shards_of_an_approximate_index_find_no_less(
    tmp_path: Path,
    settings_for: Settings,
    changed_corpus: tuple[Path, Path],
    whole_and_sharded,
    kind: str,
    equal: bool,
) -> None:
    base, _ = changed_corpus
    workspace = tmp_path / "workspace"
    settings = settings_for(
        workspace, f"corpus.path={base}", "index.segment_passages=64", f"index.kind={kind}", "retrieval.mode=dense"
    )
    build_index(settings)
    (whole, _), (sharded, _) = whole_and_sharded(settings)
    assert whole == sharded or not equal
    assert whole.select(["query_id", "rank"]) == sharded.select(["query_id", "rank"])
    assert (np.asarray(sharded["score"]) >= np.asarray(whole["score"]) - 1e-6).all()


def stop_before_publishing(settings: config.Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose every unit is done but which is not published; its work directory."""

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("stopped before publishing")

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "publish", fail)
        with pytest.raises(RuntimeError, match="stopped before"):
            retrieve(settings)
    (work,) = (path for path in (Path(settings.workspace) / "runs" / ".work").iterdir() if path.is_dir())
    return work


def test_a_run_goes_on_where_some_searches_are_lost(
    settings_of: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of("retrieval.candidates=13", "cluster.encoder_workers=1", SHARDED)
    undisturbed = run(settings.using("cluster.shard_bytes=1000000000"))
    undisturbed["num_shards"] = 8
    work = stop_before_publishing(settings, monkeypatch)
    (search,) = work.glob("depth-*/search-*")
    markers = sorted(search.glob("*.json"))
    for marker in markers[::2]:
        marker.unlink()
    (search / "unit-00000001.parquet").unlink()
    for marker in (work / "hits").glob("*.json"):
        marker.unlink()
    capsys.readouterr()
    assert run(settings) == undisturbed
    said = capsys.readouterr().err
    skipped = [line for line in said.splitlines() if "were finished by an earlier run and are skipped" in line]
    assert [line.split(":")[0] for line in skipped] == ["encode", "count", "search"]
    assert not work.exists()


def test_another_division_into_shards_reuses_nothing_of_the_first(settings_of: Settings, job_of) -> None:
    settings = settings_of()
    with staged_queries.staged_queries(settings) as staged:
        job, units = job_of(settings, staged)
        other = dataclasses.replace(job, shards=(job.shards[0] + job.shards[1], *job.shards[2:]), hits=f"{job.hits}-2")
        assert job.stage("encode") == other.stage("encode")
        assert not {job.stage("count"), job.stage("search")} & {other.stage("count"), other.stage("search")}
        stages_in_process(job, units)
        stages_in_process(other, units)
    assert committed(Path(job.hits)) == committed(Path(other.hits))


def test_a_repeated_run_in_an_object_store_reuses_nothing_stale(
    settings_of: Settings, job_of, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path / "cache"))
    settings = settings_of("retrieval.mode=dense")

    def fail(*_: object) -> np.ndarray:
        raise ValueError("the first time nothing can be encoded")

    with staged_queries.staged_queries(settings) as staged:
        job, units = job_of(settings, staged)
        stages_in_process(job, units)
        remote = dataclasses.replace(job, work=f"memory://{tmp_path}/work", hits=f"memory://{tmp_path}/work/hits")
        with monkeypatch.context() as patched:
            patched.setattr(retriever, "encode_queries", fail)
            stages_in_process(remote, units)
        assert not sum(part.num_rows for part in runs.merged(remote.hits, units, "hits.parquet"))
        filesystem.remove(remote.work)
        stages_in_process(remote, units)
    found = pa.concat_tables(list(runs.merged(remote.hits, units, "hits.parquet")))
    assert found.num_rows
    assert found == committed(Path(job.hits))[0]


def test_no_worker_ever_has_two_shards_open(settings_of: Settings, job_of, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("retrieval.filter={parity: 1}")
    alive: list[weakref.ref[object]] = []
    opened: list[tuple[int, ...]] = []
    plain = snapshot.open_index

    def spy(*arguments: object, **options: object) -> snapshot.Index:
        assert not [each for each in alive if each() is not None], "the shard before is still open"
        found = plain(*arguments, **options)
        assert len(found.segments) == 1
        alive.extend(map(weakref.ref, (found, *found.segments, found.passages, found.vectors, found.lexical)))
        opened.append(tuple(options["shard"]))
        return found

    monkeypatch.setattr(snapshot, "open_index", spy)
    gc.disable()  # what is dropped must not depend on when the collector happens to run
    try:
        with staged_queries.staged_queries(settings) as staged:
            job, units = job_of(settings, staged)
            stages_in_process(job, units)
    finally:
        gc.enable()
    assert len(units) == 3
    assert opened == [*job.shards, *job.shards], "once each to count and to search, in order"


class TextReranker:
    """A stand-in for a cross-encoder whose order nobody could get by chance."""

    first_stage_weight = 0.0

    def __init__(self, *_: object) -> None:
        pass

    def score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        return np.array([sum(map(ord, text)) % 101 + len(query) for query, text in pairs], dtype=np.float32)


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_a_reranker_sees_the_same_candidates_of_shards(
    settings_of: Settings, whole_and_sharded, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(retriever, "Reranker", TextReranker)
    whole, sharded = whole_and_sharded(
        settings_of("retrieval.reranker=stand-in", f"retrieval.mode={mode}", "retrieval.candidates=11")
    )
    assert whole == sharded
    assert all(score == int(score) for score in whole[0]["score"].to_pylist()), "scores are the reranker's"
