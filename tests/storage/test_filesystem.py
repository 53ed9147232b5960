"""Files are replaced atomically, copied and fetched, locally and in an object store."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from ragtune_ray.storage import filesystem


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place on the local disk and in an object store."""
    return str(tmp_path / "place") if request.param == "local" else f"memory://{tmp_path}"


def test_replaced_text_is_read_back_without_leftovers(root: str) -> None:
    url = filesystem.join(root, "deep", "CURRENT")
    filesystem.replace_text(url, "1\n")
    filesystem.replace_text(url, "2\n")
    assert filesystem.read_text(url) == "2\n"
    assert filesystem.list_names(filesystem.join(root, "deep")) == ["CURRENT"]


def test_write_failing_before_the_rename_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "CURRENT")
    filesystem.replace_text(url, "old")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        filesystem.replace_text(url, "new")
    assert filesystem.read_text(url) == "old"


def test_file_is_committed_across_file_systems(tmp_path: Path) -> None:
    shared = Path("/dev", "shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system to write to")
    with tempfile.TemporaryDirectory(dir=shared) as elsewhere:
        local = Path(elsewhere) / "x.txt"
        local.write_text("one")
        filesystem.commit_file(local, str(tmp_path / "deep" / "x.txt"))
        assert not local.exists()
    assert (tmp_path / "deep" / "x.txt").read_text() == "one"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.txt"]


def test_copying_a_tree_replaces_the_target(root: str) -> None:
    filesystem.replace_text(filesystem.join(root, "a", "deep", "x.txt"), "one")
    filesystem.replace_text(filesystem.join(root, "b", "old.txt"), "old")
    filesystem.copy_tree(filesystem.join(root, "a"), filesystem.join(root, "b"))
    assert filesystem.list_names(filesystem.join(root, "b")) == ["deep"]
    assert filesystem.read_text(filesystem.join(root, "b", "deep", "x.txt")) == "one"


def test_copy_keeps_its_text_when_the_source_is_replaced(root: str) -> None:
    filesystem.replace_text(filesystem.join(root, "a", "x.txt"), "one")
    filesystem.copy_tree(filesystem.join(root, "a"), filesystem.join(root, "b"))
    filesystem.replace_text(filesystem.join(root, "a", "x.txt"), "two")
    assert filesystem.read_text(filesystem.join(root, "b", "x.txt")) == "one"


def test_fetching_returns_the_current_content_each_time(root: str) -> None:
    url = filesystem.join(root, "a", "x.txt")
    for text in ("one", "two"):
        filesystem.replace_text(url, text)
        with filesystem.fetched(url) as path:
            assert path.name == "x.txt"
            assert path.read_text() == text
    assert filesystem.read_text(url) == "two", "only the local copy is removed"


def test_local_copy_is_made_once_per_version_unless_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path))
    folder = f"memory://{tmp_path}/a"
    for number, (refresh, expected) in enumerate([(False, "0"), (False, "0"), (True, "2")]):
        filesystem.replace_text(filesystem.join(folder, "x.txt"), str(number))
        assert (filesystem.local_copy(folder, ["x.txt"], "v", refresh=refresh) / "x.txt").read_text() == expected
    with pytest.raises(FileNotFoundError):
        filesystem.local_copy(folder, ["x.txt", "y.txt"], "v")
    assert [path.name for path in (tmp_path / "artifacts" / "v").iterdir()] == ["x.txt"], "no partial file is left"


def test_listing_or_removing_a_missing_path_is_no_error(root: str) -> None:
    filesystem.remove(filesystem.join(root, "nothing"))
    assert filesystem.list_names(filesystem.join(root, "nothing")) == []
    assert not filesystem.exists(filesystem.join(root, "nothing"))


def test_too_little_space_is_refused_with_needed_and_free_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "free_bytes", lambda _: 2**20)
    filesystem.require_space(str(tmp_path), 2**20, "a segment")
    with pytest.raises(filesystem.SpaceError, match=r"a segment: about 1\.5 MiB are needed, 1\.0 MiB"):
        filesystem.require_space(str(tmp_path), 3 * 2**19, "a segment")


def test_free_space_of_a_missing_path_is_that_of_its_nearest_parent(tmp_path: Path) -> None:
    assert filesystem.free_bytes("memory://anywhere") is None
    free = filesystem.free_bytes(str(tmp_path / "not" / "yet"))
    assert free is not None
    assert 0 < free <= shutil.disk_usage(tmp_path).total


def test_a_tree_is_copied_where_files_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    filesystem.replace_text(str(tmp_path / "a" / "deep" / "x.txt"), "one")
    filesystem.copy_tree(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b" / "deep" / "x.txt").read_text() == "one"
