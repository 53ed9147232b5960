"""Index builds of small corpora, which run in this process without Ray."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ragtune_ray import config, schema
from ragtune_ray.cluster.indexing import building
from ragtune_ray.cluster.indexing.compact import compact
from ragtune_ray.cluster.indexing.documents import DuplicateError
from ragtune_ray.cluster.indexing.index import CorpusError, build_index
from ragtune_ray.cluster.indexing.update import delete_documents, upsert_documents
from ragtune_ray.index import contents, faiss_index, retention, snapshot, versions
from ragtune_ray.index.retriever import open_retriever
from ragtune_ray.ingest import readers
from ragtune_ray.ingest.parsing.text import ParsedFile, TransientError
from ragtune_ray.storage import artifacts
from tests.support.corpora import rewrite
from tests.support.indexes import living, segment_manifests


def test_every_passage_reconstructs_its_document(tmp_path: Path, settings_for, corpus: Path) -> None:
    build_index(settings_for(tmp_path))
    texts = {row["document_id"]: row["text"] for row in map(json.loads, corpus.read_text().splitlines())}
    passages = list(schema.from_table(snapshot.open_index(str(tmp_path)).passages, schema.Passage))
    assert {passage.document_id for passage in passages} == set(texts)
    for passage in passages:
        assert texts[passage.document_id][passage.start : passage.end] == passage.text
    assert len({passage.passage_id for passage in passages}) == len(passages)


def test_a_finished_build_is_not_repeated(
    tmp_path: Path, settings_for, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_index(settings_for(tmp_path))
    assert build_index(settings_for(tmp_path)) == first
    assert "nothing to do" in capsys.readouterr().err
    assert versions.list_versions(str(tmp_path)) == ["000001"]


def listings(workspace: Path) -> dict[str, str]:
    """The recorded listings, with the corpus that was read from each."""
    found = (workspace / "index" / "listings").glob("*.json")
    return {path.stem: json.loads(path.read_text())["corpus_id"] for path in found}


def test_a_touched_corpus_is_read_once_more_and_nothing_is_embedded(
    tmp_path: Path, settings_for, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, own = tmp_path / "workspace", Path(shutil.copy(corpus, tmp_path))
    settings = settings_for(workspace, f"corpus.path={own}")
    first = build_index(settings)
    rewrite(own, own.read_bytes())
    capsys.readouterr()
    assert build_index(settings) == first
    shown = capsys.readouterr().err
    assert "version 000001 already contains all that could be read" in shown
    assert not embedded(shown)
    assert set(listings(workspace).values()) == {artifacts.read_manifest(str(first))["corpus_id"]}
    assert len(listings(workspace)) == 2
    monkeypatch.setattr(building, "run", lambda *_, **__: pytest.fail("the corpus was read"))
    assert build_index(settings) == first
    assert "nothing to do" in capsys.readouterr().err


def test_a_moved_corpus_is_known_by_its_sha256_without_reading_it(
    tmp_path: Path, settings_for, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, moved = tmp_path / "workspace", tmp_path / "moved" / corpus.name
    first = build_index(settings_for(workspace, "corpus.fingerprint=sha256"))
    moved.parent.mkdir()
    moved.write_bytes(corpus.read_bytes())
    monkeypatch.setattr(building, "run", lambda *_, **__: pytest.fail("the corpus was read"))
    assert build_index(settings_for(workspace, "corpus.fingerprint=sha256", f"corpus.path={moved}")) == first


def test_garbage_collection_forgets_listings_of_corpora_that_no_version_has(
    tmp_path: Path, settings_for, corpus: Path
) -> None:
    workspace, own = tmp_path / "workspace", Path(shutil.copy(corpus, tmp_path))
    settings = settings_for(workspace, f"corpus.path={own}")
    build_index(settings)
    before = listings(workspace)
    rewrite(own, own.read_bytes().replace(b"secret7.", b"hidden7."))
    second = build_index(settings)
    after = listings(workspace)
    assert len(after) == 2
    assert retention.collect(str(workspace), 2, 0.0).versions == ()
    assert listings(workspace) == after
    assert retention.collect(str(workspace), 1, 0.0).versions == ("000001",)
    assert listings(workspace) == {name: kept for name, kept in after.items() if name not in before}
    (record,) = (workspace / "index" / "listings").iterdir()
    record.write_text("{")
    assert build_index(settings) == second, "a damaged record is no record"


def test_rejected_rows_are_named_by_their_line_in_the_file(tmp_path: Path, settings_for, corpus: Path) -> None:
    rows = corpus.read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*rows[:40], "{", "", *rows[40:], rows[3]]))
    version = build_index(settings_for(tmp_path / "workspace", f"corpus.path={broken}", "corpus.unit_bytes=900"))
    rejects = [json.loads(line) for line in (Path(version) / "rejects.jsonl").read_text().splitlines()]
    assert sorted(reject["place"] for reject in rejects) == [f"{broken}:41", f"{broken}:{len(rows) + 3}"]
    assert f"the same document is at {broken}:4; this copy is dropped" in {reject["reason"] for reject in rejects}


def test_a_changed_corpus_makes_a_version_and_keeps_the_old(tmp_path: Path, settings_for, corpus: Path) -> None:
    changed = tmp_path / "changed.jsonl"
    changed.write_text(corpus.read_text() + json.dumps({"document_id": "new", "text": "Something new."}) + "\n")
    workspace = tmp_path / "workspace"
    build_index(settings_for(workspace))
    build_index(settings_for(workspace, f"corpus.path={changed}"))
    assert versions.current_version(str(workspace)) == "000002"
    counts = [
        snapshot.open_index(str(workspace), version).manifest["num_documents"] for version in ("000001", "000002")
    ]
    assert counts == [60, 61]
    assert contents.index_problems(str(workspace), "000001") == []


def test_the_manifest_records_counts_config_encoder_and_seconds(tmp_path: Path, settings_for) -> None:
    settings = settings_for(tmp_path)
    manifest = artifacts.read_manifest(str(build_index(settings)))
    opened = snapshot.open_index(str(tmp_path))
    assert manifest["num_documents"] == 60
    assert manifest["num_passages"] == opened.passages.num_rows == opened.vectors.num_vectors
    assert manifest["num_passages"] == opened.lexical.num_passages
    assert manifest["config"] == settings.model_dump(mode="json")
    assert manifest["encoder"] == {"model": "hashing-64", "fingerprint": "hashing-64", "dimension": 64}
    assert set(manifest["seconds"]) == {"embed", "segment", "total"}
    assert not (tmp_path / "index" / "building").exists() or not list((tmp_path / "index" / "building").iterdir())


def test_a_repeated_document_is_dropped_and_counted(tmp_path: Path, settings_for, corpus: Path) -> None:
    first = corpus.read_text().splitlines()[0]
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text(corpus.read_text() + first + "\n" + first + "\n")
    workspace = tmp_path / "workspace"
    url = build_index(settings_for(workspace, f"corpus.path={doubled}"))
    opened = snapshot.open_index(str(workspace))
    assert opened.manifest["num_documents"] == 60
    assert opened.manifest["num_rejects"] == {"row": 2}
    rejects = [json.loads(line) for line in (Path(url) / "rejects.jsonl").read_text().splitlines()]
    assert [reject["place"].rsplit(":", 1)[1] for reject in rejects] == ["61", "62"]
    assert all("doubled.jsonl:1;" in reject["reason"] for reject in rejects)
    ids = opened.passages["passage_id"].to_pylist()
    assert len(ids) == len(set(ids))


def test_one_id_with_two_texts_is_refused_with_both_places(tmp_path: Path, settings_for, corpus: Path) -> None:
    clash = tmp_path / "clash.jsonl"
    clash.write_text(corpus.read_text() + json.dumps({"document_id": "d3", "text": "Another text."}) + "\n")
    with pytest.raises(DuplicateError) as error:
        build_index(settings_for(tmp_path / "workspace", f"corpus.path={clash}", "corpus.unit_bytes=1000"))
    assert "'d3'" in str(error.value)
    assert "clash.jsonl:4 " in str(error.value)
    assert "clash.jsonl:61" in str(error.value)
    assert versions.list_versions(str(tmp_path / "workspace")) == []


def bad_folder(path: Path) -> None:
    """One good document among one of every kind of bad file."""
    path.mkdir()
    (path / "good.md").write_text("# Good\n\nA sound document.")
    (path / "latin.txt").write_bytes("caf\xe9 na\xefve".encode("latin-1"))
    (path / "empty.txt").write_bytes(b"")
    (path / "blank.md").write_text("   \n")
    (path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    (path / "page.pdf").write_bytes(b"%PDF-1.4 broken")
    (path / "program.exe").write_bytes(b"MZ")
    lines = ['{"document_id": "ok", "text": "A sound line."}', '{"document_id": "no text"}', "{broken"]
    lines += ['{"document_id": "lone", "text": "a lone \\ud800 surrogate"}', '{"document_id": "nan", "text": NaN}']
    lines += [json.dumps({"document_id": "long", "text": "x" * 200_000})]
    (path / "rows.jsonl").write_text("\n".join(lines) + "\n")


def test_bad_files_and_rows_are_counted_and_skipped(tmp_path: Path, settings_for) -> None:
    bad_folder(tmp_path / "folder")
    workspace = tmp_path / "workspace"
    settings = settings_for(workspace, f"corpus.path={tmp_path / 'folder'}", "corpus.max_document_bytes=100000")
    url = build_index(settings)
    opened = snapshot.open_index(str(workspace))
    assert set(opened.passages["document_id"].to_pylist()) == {"good.md", "ok", "lone"}
    rejects = [json.loads(line) for line in (Path(url) / "rejects.jsonl").read_text().splitlines()]
    places = sorted(Path(reject["place"]).name for reject in rejects)
    assert places == [
        "blank.md",
        "cut.parquet",
        "empty.txt",
        "latin.txt",
        "page.pdf",
        "program.exe",
        "rows.jsonl:2",
        "rows.jsonl:3",
        "rows.jsonl:5",
        "rows.jsonl:6",
    ]
    assert sum(opened.manifest["num_rejects"].values()) == len(rejects)
    kinds = opened.manifest["kinds"]
    assert {kind: (found.get("read", 0), found.get("rejected", 0)) for kind, found in kinds.items()} == {
        ".exe": (0, 1), ".jsonl": (2, 4), ".md": (1, 1), ".parquet": (0, 1), ".pdf": (0, 1), ".txt": (0, 2),
    }  # fmt: skip
    with pytest.raises(CorpusError, match=r"corpus\.strict: 10 inputs were rejected; the first: "):
        build_index(settings.using("corpus.strict=true", f"workspace={tmp_path / 'strict'}"))
    assert versions.list_versions(str(tmp_path / "strict")) == []


def test_a_corpus_of_rejects_only_is_refused(tmp_path: Path, settings_for) -> None:
    (tmp_path / "rows.jsonl").write_text('{"document_id": "a", "text": " "}\n')
    with pytest.raises(CorpusError, match=r"nothing was left to index.*rows\.jsonl:1: "):
        build_index(settings_for(tmp_path / "workspace", f"corpus.path={tmp_path / 'rows.jsonl'}"))
    assert versions.list_versions(str(tmp_path / "workspace")) == []


def test_a_passage_without_a_finite_vector_is_a_reject(tmp_path: Path, settings_for, nan_encoder: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    rows = [{"document_id": f"d{n}", "text": "poison?" if n % 5 == 2 else f"word number {n}"} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    workspace = tmp_path / "workspace"
    url = build_index(settings_for(workspace, f"corpus.path={path}", f"encoder.model={nan_encoder}"))
    opened = snapshot.open_index(str(workspace))
    rejects = [json.loads(line) for line in (Path(url) / "rejects.jsonl").read_text().splitlines()]
    assert [reject["place"] for reject in rejects] == ["d2#0", "d7#0", "d12#0", "d17#0"]
    assert opened.manifest["num_rejects"] == {"passage": 4}
    assert opened.vectors.num_vectors == opened.passages.num_rows == opened.lexical.num_passages == 16
    assert np.isfinite(
        opened.vectors.search(np.eye(1, opened.manifest["encoder"]["dimension"], dtype="f"), 16)[0]
    ).all()


def test_a_large_index_is_approximate_and_calibrated(
    tmp_path: Path, settings_for, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_index, "FLAT_MAX_NUMBERS", 50 * 64)
    manifest = artifacts.read_manifest(str(build_index(settings_for(tmp_path))))
    assert manifest["index_kind"] == "ivf_sq"
    assert manifest["calibration"]["recall@10"] >= 0.95
    assert manifest["bytes_per_vector"]["searched"] < manifest["bytes_per_vector"]["stored"]


def embedded(text: str) -> int:
    """Passages that the run whose progress is given has embedded."""
    lines = [line for line in text.splitlines() if line.startswith("segment ")]
    return int(lines[-1].split("/")[1].split(" ")[0].replace(",", "")) if lines else 0


def test_only_changes_are_embedded_and_the_index_equals_a_full_build(
    tmp_path: Path, settings_for, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    workspace = tmp_path / "workspace"
    build_index(settings_for(workspace))
    rows[3]["text"] = "Vessel three was painted over. The code of vessel3 is hidden3."
    rows[7]["title"] = "Another title"
    changed = tmp_path / "changed.jsonl"
    kept = [*rows[:10], *rows[12:], {"document_id": "new", "text": "Something new about vessel99."}]
    changed.write_text("".join(json.dumps(row) + "\n" for row in kept))
    capsys.readouterr()
    settings = settings_for(workspace, f"corpus.path={changed}")
    manifest = artifacts.read_manifest(str(build_index(settings)))
    assert manifest["change"] == {"added": 1, "changed": 2, "removed": 2, "unchanged": 56}
    opened = snapshot.open_index(str(workspace))
    found = {passage.passage_id: passage for passage in schema.from_table(opened.live_passages(), schema.Passage)}
    three = [passage for passage in found.values() if passage.document_id in {"d3", "d7", "new"}]
    assert embedded(capsys.readouterr().err) == len(three), "nothing else was embedded"
    anew = settings_for(tmp_path / "anew", f"corpus.path={changed}")
    build_index(anew)
    expected = snapshot.open_index(str(tmp_path / "anew")).live_passages()
    assert found == {passage.passage_id: passage for passage in schema.from_table(expected, schema.Passage)}
    queries = [f"What is the code of vessel{number}?" for number in (3, 7, 10, 20, 99)]
    for mode in ("dense", "lexical", "hybrid"):
        one, other = (
            open_retriever(each.using(f"retrieval.mode={mode}")).retrieve(queries, queries, 1)
            for each in (settings, anew)
        )
        assert [hits[0].passage_id for hits in one] == [hits[0].passage_id for hits in other]


def test_an_earlier_corpus_is_published_again_without_embedding(
    tmp_path: Path, settings_for, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(line + "\n" for line in corpus.read_text().splitlines()[:50]))
    workspace = tmp_path / "workspace"
    build_index(settings_for(workspace))
    build_index(settings_for(workspace, f"corpus.path={shorter}"))
    capsys.readouterr()
    url = build_index(settings_for(workspace))
    assert artifacts.read_manifest(str(url))["restores"] == "000001"
    assert not embedded(capsys.readouterr().err)
    first, third = (versions.read_version(str(workspace), name) for name in ("000001", "000003"))
    assert first.entries == third.entries
    total = len(corpus.read_text().splitlines())
    assert url.changes.counts() == {"added": total - 50, "replaced": 0, "deleted": 0, "unchanged": 50}
    again = build_index(settings_for(workspace))
    assert again.changes.counts() == {"added": 0, "replaced": 0, "deleted": 0, "unchanged": total}


def test_a_resumed_build_repeats_segments_that_are_gone(
    tmp_path: Path, settings_for, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(settings_for(tmp_path / "undisturbed", "index.segment_passages=100"))
    workspace = tmp_path / "workspace"
    settings = settings_for(workspace, "index.segment_passages=100")

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("stopped before publishing")

    with monkeypatch.context() as patched:
        patched.setattr(versions, "publish_version", fail)
        with pytest.raises(RuntimeError, match="stopped before"):
            build_index(settings)
    (lost, *_) = sorted((workspace / "index" / "segments").iterdir())
    shutil.rmtree(lost)
    build_index(settings)
    assert segment_manifests(workspace) == segment_manifests(tmp_path / "undisturbed")
    assert contents.index_problems(str(workspace)) == []


def test_strict_refuses_a_version_whose_rejects_were_counted_earlier(
    tmp_path: Path, settings_for, corpus: Path
) -> None:
    """Whether the version stands, was compacted, or would be published again."""
    path = tmp_path / "corpus.jsonl"
    path.write_text(corpus.read_text() + '{"document_id": "no text"}\n')
    settings = settings_for(tmp_path / "workspace", f"corpus.path={path}", "index.segment_passages=100")
    strict = settings.using("corpus.strict=true", "index.segment_passages=10000")
    build_index(settings)
    assert compact(strict, in_process=True) is not None
    build_index(settings.using(f"corpus.path={corpus}", "index.segment_passages=10000"))
    names = versions.list_versions(settings.workspace)
    assert names == ["000001", "000002", "000003"]
    kinds = [versions.read_version(settings.workspace, name).manifest.get("kinds") for name in names]
    assert kinds[0] == kinds[1] == {".jsonl": {"read": 60, "rejected": 1}}
    with pytest.raises(CorpusError, match=r"corpus\.strict: 1 inputs were rejected; the first: .*corpus\.jsonl:61"):
        build_index(strict)
    versions.roll_back(settings.workspace, "000001")
    with pytest.raises(CorpusError, match=r"corpus\.strict: 1 inputs were rejected; the first: .*corpus\.jsonl:61"):
        build_index(strict)
    assert versions.list_versions(settings.workspace) == [*names, "000004"]
    assert str(build_index(settings)) == versions.version_url(settings.workspace, "000004")


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of files whose parser takes too long, until they are removed from the set."""
    names: set[str] = set()
    parse_file = readers.parse_file

    def parse(path: str, data: bytes, corpus: config.Corpus) -> ParsedFile:
        if Path(path).name in names:
            raise TransientError("took too long")
        return parse_file(path, data, corpus)

    monkeypatch.setattr(readers, "parse_file", parse)
    return names


def test_files_that_could_not_be_read_are_read_again_and_others_not_embedded_again(
    tmp_path: Path, settings_for, unread: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(f"Text {name}.")
    settings = settings_for(tmp_path / "workspace", f"corpus.path={folder}")
    unread |= {"b.txt", "c.txt"}
    first = build_index(settings)
    rejects = [json.loads(line) for line in (Path(first) / "rejects.jsonl").read_text().splitlines()]
    assert [reject["is_transient"] for reject in rejects] == [True, True]
    assert artifacts.read_manifest(str(first))["num_transient_rejects"] == 2
    capsys.readouterr()
    assert build_index(settings) == first
    assert (
        "version 000001 already contains all that could be read of this corpus, 2 rejected" in capsys.readouterr().err
    )
    unread.discard("b.txt")
    second = build_index(settings)
    assert second.changes.counts() == {"added": 1, "replaced": 0, "deleted": 0, "unchanged": 1}
    assert segment_manifests(settings.workspace)[:1] == segment_manifests(settings.workspace, "000001")
    # After the rollback the documents are as before the second build, whose segments must not be taken for those of the fourth.
    versions.roll_back(settings.workspace, "000001")
    unread.clear()
    assert build_index(settings).name == "000004"
    assert living(settings.workspace) == {"a.txt", "b.txt", "c.txt"}
    capsys.readouterr()
    assert build_index(settings).name == "000004"
    assert "nothing to do" in capsys.readouterr().err


def test_an_upsert_after_a_rollback_takes_files_that_could_not_be_read_before(
    tmp_path: Path, settings_for, unread: set[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b", "c"):
        (folder / f"{name}.txt").write_text(f"Text {name}.")
    settings = settings_for(tmp_path / "workspace")
    build_index(settings)
    before = living(settings.workspace)
    unread.add("b.txt")
    upsert_documents(settings, str(folder), in_process=True)
    assert living(settings.workspace) == before | {"c.txt"}
    versions.roll_back(settings.workspace)
    unread.clear()
    upsert_documents(settings, str(folder), in_process=True)
    assert living(settings.workspace) == before | {"b.txt", "c.txt"}


@pytest.mark.parametrize("strict", ["true", "false"])
def test_a_refused_corpus_is_read_again_if_files_could_not_be_read(
    tmp_path: Path, settings_for, unread: set[str], strict: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("Text a.")
    (folder / "b.txt").write_text("Text b." if strict == "true" else " ")
    settings = settings_for(tmp_path / "workspace", f"corpus.path={folder}", f"corpus.strict={strict}")
    unread.add("a.txt")
    with pytest.raises(CorpusError, match="rejected"):
        build_index(settings)
    unread.clear()
    build_index(settings)
    assert "a.txt" in living(settings.workspace)


def test_garbage_collection_spares_the_base_of_a_running_build(
    tmp_path: Path, settings_for, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path / "workspace")
    build_index(settings)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(corpus.read_text() + json.dumps({"document_id": "new", "text": "Something new."}) + "\n")
    run = building.run

    def overtaken(build: building.Build) -> building.Segments:
        delete_documents(settings, ["no such document", "d59"])
        retention.collect(settings.workspace, keep=1, min_age_seconds=3600)
        assert versions.list_versions(settings.workspace) == ["000001", "000002"]
        monkeypatch.setattr(building, "run", run)
        return run(build)

    monkeypatch.setattr(building, "run", overtaken)
    url = build_index(settings.using(f"corpus.path={changed}"))
    manifest = artifacts.read_manifest(str(url))
    assert (manifest["version"], manifest["num_documents"]) == ("000003", 61)
