"""Artifacts are published whole by one publisher, and damaged ones are refused."""

import itertools
import re
import shutil
from pathlib import Path

import fsspec
import pytest

from ragtune_ray.storage import artifacts, checksums, filesystem


def _publish(url: str, files: dict[str, str], **facts: object) -> bool:
    staging = artifacts.stage(url)
    for name, text in files.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_text(text)
    return artifacts.publish(staging, url, "thing", **facts)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place for artifacts on the local disk and in an object store."""
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path / "cache"))
    return str(tmp_path / "place") if request.param == "local" else f"memory://{tmp_path}"


def test_opening_an_artifact_returns_its_files_and_facts(root: str) -> None:
    url = filesystem.join(root, "a")
    assert _publish(url, {"x.txt": "one", "sub/y.txt": "two"}, rows=3)
    artifact = artifacts.open_artifact(url, "thing")
    assert (artifact.path / "sub" / "y.txt").read_text() == "two"
    assert artifact.manifest["rows"] == 3
    assert artifacts.find_problems(url) == []


def test_url_does_not_exist_before_publish(root: str) -> None:
    url = filesystem.join(root, "a")
    staging = artifacts.stage(url)
    (staging / "x.txt").write_text("half")
    assert not artifacts.is_finished(url)
    assert filesystem.list_names(root) == []
    with pytest.raises(artifacts.ArtifactError, match="missing or unfinished"):
        artifacts.open_artifact(url)
    shutil.rmtree(staging)


def test_second_publisher_loses_and_gets_false(root: str) -> None:
    url = filesystem.join(root, "a")
    assert _publish(url, {"x.txt": "first"})
    assert not _publish(url, {"x.txt": "second"})
    assert (artifacts.open_artifact(url).path / "x.txt").read_text() == "first"


def test_publishing_over_an_ordinary_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious.txt").write_text("mine")
    with pytest.raises(artifacts.ArtifactError, match="cannot be published over"):
        _publish(str(tmp_path / "a"), {"x.txt": "one"})
    assert (tmp_path / "a" / "precious.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "the staging directory is gone"


def test_opening_an_artifact_of_another_kind_is_refused(root: str) -> None:
    _publish(filesystem.join(root, "a"), {"x.txt": "one"})
    with pytest.raises(artifacts.ArtifactError, match="is a thing, not a segment"):
        artifacts.open_artifact(filesystem.join(root, "a"), "segment")


def test_one_flipped_bit_in_any_file_is_detected(tmp_path: Path) -> None:
    url = tmp_path / "a"
    _publish(str(url), {"x.txt": "some text", "sub/y.txt": "more"}, note="ä")
    for file in [path for path in url.rglob("*") if path.is_file()]:
        sound = file.read_bytes()
        for position, bit in itertools.product(range(len(sound)), (0, 5)):
            file.write_bytes(sound[:position] + bytes([sound[position] ^ (1 << bit)]) + sound[position + 1 :])
            assert artifacts.find_problems(str(url)), (file.name, position, bit)
            with pytest.raises(artifacts.ArtifactError):
                artifacts.open_artifact(str(url))
        file.write_bytes(sound)
    assert artifacts.find_problems(str(url)) == []


@pytest.mark.parametrize("damage", ["missing", "truncated", "stray"])
def test_missing_truncated_and_stray_files_are_named(tmp_path: Path, damage: str) -> None:
    url = tmp_path / "a"
    _publish(str(url), {"x.txt": "some text"})
    match damage:
        case "missing":
            (url / "x.txt").unlink()
        case "truncated":
            (url / "x.txt").write_text("some")
        case "stray":
            (url / "z.txt").write_text("?")
    (problem,) = artifacts.find_problems(str(url))
    assert ("z.txt" if damage == "stray" else "x.txt") in problem


def test_damaged_remote_artifact_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path))
    url = f"memory://{tmp_path}/a"
    _publish(url, {"x.txt": "some text"})
    fsspec.filesystem("memory").pipe_file(f"{tmp_path}/a/x.txt", b"same size")
    with pytest.raises(artifacts.ArtifactError, match=r"x\.txt does not match its sha256"):
        artifacts.open_artifact(url)


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("flipped", "sub/x.txt does not match its sha256"),
        ("truncated", "sub/x.txt has 4 bytes, its manifest says 9"),
        ("missing", "sub/x.txt is missing"),
        ("stray", ""),  # a publisher that lost the race leaves its uploads
    ],
)
def test_remote_artifact_is_verified_in_its_store_despite_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, problem: str, is_cached: bool
) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path))
    url, store = f"memory://{tmp_path}/a", fsspec.filesystem("memory")
    _publish(url, {"sub/x.txt": "some text", "y.txt": "more"})
    if is_cached:
        artifacts.open_artifact(url)
    assert artifacts.find_problems(url) == []
    match damage:
        case "flipped":
            store.pipe_file(f"{tmp_path}/a/sub/x.txt", b"same size")
        case "truncated":
            store.pipe_file(f"{tmp_path}/a/sub/x.txt", b"some")
        case "missing":
            store.rm_file(f"{tmp_path}/a/sub/x.txt")
        case "stray":
            store.pipe_file(f"{tmp_path}/a/sub/z.txt", b"?")
    assert artifacts.find_problems(url) == ([f"{url}: {problem}"] if problem else [])
    if damage != "stray" and not is_cached:
        with pytest.raises(artifacts.ArtifactError, match=re.escape(f"{url}: damaged: {problem}; run the command")):
            artifacts.open_artifact(url)


@pytest.mark.parametrize("content", [b"same size", b"some", b""])
def test_copy_damaged_in_the_cache_is_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path))
    url = f"memory://{tmp_path}/a"
    _publish(url, {"x.txt": "some text", "y.txt": "more"})
    copy = artifacts.open_artifact(url).path / "x.txt"
    copy.write_bytes(content)
    assert (artifacts.open_artifact(url).path / "x.txt").read_text() == "some text"
    assert copy.read_text() == "some text"
    # A file that is also damaged in the store stays refused.
    copy.write_bytes(content)
    fsspec.filesystem("memory").pipe_file(f"{tmp_path}/a/x.txt", b"same size")
    with pytest.raises(artifacts.ArtifactError, match=r"x\.txt does not match its sha256"):
        artifacts.open_artifact(url)


def test_same_files_and_facts_produce_identical_manifests(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _publish(str(tmp_path / name), {"x.txt": "one", "y.txt": "two"}, rows=1)
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_removing_the_scratch_directory_removes_its_staging(tmp_path: Path) -> None:
    staging = artifacts.stage(str(tmp_path / "place" / "a"), scratch=str(tmp_path / "scratch"))
    assert staging.parent == tmp_path / "scratch"
    filesystem.remove(str(tmp_path / "scratch"))
    assert not staging.exists()
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.parametrize("name", ["../x.txt", "sub/../../x.txt", "/etc/passwd", "a\0b", "", "./x.txt", "..\\x.txt"])
def test_a_manifest_that_names_files_outside_is_refused_before_they_are_touched(root: str, name: str) -> None:
    url = filesystem.join(root, "a")
    manifest = {
        "format": 1,
        "kind": "thing",
        "package_version": "0",
        "files": {name: {"bytes": 3, "sha256": checksums.bytes_sha256(b"one")}},
    }
    sha256 = checksums.bytes_sha256(checksums.canonical_json(manifest))
    text = checksums.canonical_json({**manifest, "manifest_sha256": sha256}).decode()
    filesystem.replace_text(filesystem.join(root, "x.txt"), "one")
    filesystem.replace_text(filesystem.join(url, "manifest.json"), text)
    with pytest.raises(artifacts.ArtifactError, match="outside the directory"):
        artifacts.open_artifact(url)
    assert "outside the directory" in artifacts.find_problems(url)[0]
    assert not (filesystem.cache_directory() / "artifacts").exists()
