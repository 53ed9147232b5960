"""What a build measures and keeps for later builds on it: known scripts, titles in BM25. Small corpora, without Ray."""

import json
from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.cluster import runs
from ragtune_ray.cluster.indexing.compact import compact
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.indexing.update import upsert_documents
from ragtune_ray.index import words
from ragtune_ray.index.retriever import open_retriever
from tests.support.indexes import latest


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def settings(tmp_path: Path) -> config.Config:
    """The hashing encoder takes a run of Chinese characters for one word, so no sentence finds its passage."""
    english = [
        {"document_id": f"e{n}", "title": f"Ship{n}", "text": f"Cook {n * 7} sails. Name{n} is old{n}. All is well{n}."}
        for n in range(20)
    ]
    chinese = [
        {"document_id": f"c{n}", "title": "", "text": f"船号{n}向北航行很久的厨师来自远方{n}号港口"} for n in range(20)
    ]
    corpus = write(tmp_path / "corpus.jsonl", [*english, *chinese])
    return config.Config().using(
        f"workspace={tmp_path / 'workspace'}", f"corpus.path={corpus}", "encoder.model=hashing-512"
    )


def test_a_build_says_which_scripts_the_encoder_does_not_know(
    settings: config.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    build_index(settings)
    found = latest(settings.workspace).manifest["scripts"]
    assert found["LATIN"] == {"passages": 20, "found": 20}
    assert found["CJK"]["passages"] == 20
    assert found["CJK"]["found"] < 14
    said = capsys.readouterr().err
    assert "does not know the script CJK" in said
    assert "retrieval.unknown_script_weight" in said
    assert "LATIN" not in said


def test_the_scripts_are_part_of_the_identity_of_hybrid_runs_alone(settings: config.Config) -> None:
    build_index(settings)
    _, manifest = runs.index_version(settings)
    assert runs.retrieval_identity(settings, manifest)["unknown_scripts"] == ["CJK"]
    for override in ("retrieval.fusion=ranks", "retrieval.mode=lexical"):
        assert "unknown_scripts" not in runs.retrieval_identity(settings.using(override), manifest)
    assert "unknown_scripts" not in runs.retrieval_identity(settings, {**manifest, "scripts": {}})


@pytest.mark.parametrize("titles", [True, False])
def test_later_segments_search_titles_as_the_first_ones_do(
    settings: config.Config, tmp_path: Path, titles: bool
) -> None:
    built = settings.using(f"index.lexical_titles={titles}", "retrieval.mode=lexical")
    build_index(built)
    added = write(tmp_path / "more.jsonl", [{"document_id": "new", "title": "Zeppelin", "text": "It flies."}])
    other = built.using(f"index.lexical_titles={not titles}")
    upsert_documents(other, str(added))
    for _ in range(2):
        found = open_retriever(other).retrieve(["q", "r"], ["zeppelin", "ship3"], 1)
        assert [[hit.document_id for hit in hits] for hits in found] == ([["new"], ["e3"]] if titles else [[], []])
        compact(other, in_process=True)
    assert latest(built.workspace).manifest["lexical_titles"] is titles


def test_an_index_of_unfolded_words_keeps_them(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "a", "text": "Ein Café in Zürich"}, {"id": "b", "text": "Ein Fluss"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = settings.using(f"corpus.path={path}", "retrieval.mode=lexical")
    old = settings.using(f"workspace={tmp_path / 'old'}")
    with monkeypatch.context() as before:
        before.setattr(words, "folded", lambda language: language)
        build_index(old)
    build_index(settings)
    path.write_text("\n".join(map(json.dumps, [*rows, {"id": "c", "text": "Das Café Genf"}])))
    for given, found in (
        (old, {"Café": {"a", "c"}, "cafe": set()}),
        (settings, {"Café": {"a", "c"}, "cafe": {"a", "c"}}),
    ):
        build_index(given)
        compact(given, in_process=True)
        for query, expected in found.items():
            hits = open_retriever(given).retrieve(["q"], [query], 5)[0]
            assert {hit.document_id for hit in hits} == expected, (given.workspace, query)
