"""Index builds on Ray: parallel stages, any number of workers, resumption."""

from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.cluster.indexing.compact import compact
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.index import versions
from ragtune_ray.index.retriever import open_retriever
from tests.support.indexes import segment_manifests

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]


@pytest.fixture
def settings_on_ray(settings_for):
    """Like `settings_for`, but even a small corpus is indexed on Ray."""

    def build(workspace: Path, *overrides: str) -> config.Config:
        return settings_for(workspace, "cluster.address=local", *overrides)

    return build


@pytest.mark.parametrize("kind", ["flat", "ivf_sq"])
def test_a_build_in_process_has_the_segments_of_one_on_ray(
    tmp_path: Path, settings_for, settings_on_ray, kind: str
) -> None:
    chosen = (f"index.kind={kind}", "index.segment_passages=50", "corpus.unit_bytes=1500")
    build_index(settings_for(tmp_path / "process", *chosen))
    build_index(settings_on_ray(tmp_path / "ray", *chosen))
    assert len(segment_manifests(tmp_path / "process")) > 3
    assert segment_manifests(tmp_path / "process") == segment_manifests(tmp_path / "ray")


def test_search_over_many_segments_equals_search_over_one(tmp_path: Path, settings_on_ray) -> None:
    texts = [f"What is the code of vessel{number}?" for number in range(40)]
    found = []
    for name, size in (("one", 100_000), ("many", 32)):
        settings = settings_on_ray(tmp_path / name, f"index.segment_passages={size}")
        build_index(settings)
        opened = open_retriever(settings)
        found.append(opened.retrieve(texts, texts, 7))
    assert len(segment_manifests(tmp_path / "many")) > 3
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["flat", "ivf_sq", "ivf_pq", "hnsw"])
def test_segments_do_not_depend_on_the_number_of_workers(tmp_path: Path, settings_on_ray, kind: str) -> None:
    for name, workers in (("a", 1), ("b", 3)):
        build_index(
            settings_on_ray(
                tmp_path / name, f"cluster.encoder_workers={workers}", f"index.kind={kind}", "corpus.unit_bytes=1500"
            )
        )
    assert segment_manifests(tmp_path / "a") == segment_manifests(tmp_path / "b")


def test_a_resumed_build_repeats_units_whose_files_are_gone(
    tmp_path: Path, settings_on_ray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The build fails before it publishes; some of what it left is lost; the same command ends with the same bytes."""
    small = "corpus.unit_bytes=1500"
    build_index(settings_on_ray(tmp_path / "undisturbed", small))
    workspace = tmp_path / "workspace"

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("stopped before publishing")

    with monkeypatch.context() as patched:
        patched.setattr(versions, "publish_version", fail)
        with pytest.raises(RuntimeError, match="stopped before"):
            build_index(settings_on_ray(workspace, small))
    (build,) = (workspace / "index" / "building").iterdir()
    vectors, markers = (sorted((build / "units").glob(pattern)) for pattern in ("*.vectors.npy", "*.json"))
    vectors[1].unlink()
    markers[2].write_text("{ half a mark")
    capsys.readouterr()
    build_index(settings_on_ray(workspace, small))
    said = capsys.readouterr().err
    assert "embed: " in said
    assert "were finished by an earlier run and are skipped" in said
    assert segment_manifests(workspace) == segment_manifests(tmp_path / "undisturbed")


def test_compaction_on_ray_merges_segments_and_finds_the_same(tmp_path: Path, settings_on_ray) -> None:
    settings = settings_on_ray(tmp_path, "index.segment_passages=40")
    build_index(settings)
    texts = [f"What is the code of vessel{number}?" for number in range(40)]
    before = open_retriever(settings).retrieve(texts, texts, 7)
    merged = compact(settings.using("index.segment_passages=1000"), in_process=False)
    assert merged is not None
    assert len(merged.entries) == 1
    assert open_retriever(settings).retrieve(texts, texts, 7) == before
