"""A full disk: refused before anything is done where that can be known, and otherwise said clearly, with nothing lost by it."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ragtune_ray.index import versions
from ragtune_ray.storage import filesystem
from tests.support.index_changes import ADDED, STANDING, assert_converged, assert_whole, upsert

SIZE_BYTES = 8 * 2**20
STEP_BYTES = 4096
"""A page, less than which nothing takes on this file system."""


@pytest.fixture
def folder(tmp_path: Path, sandbox: Path) -> Iterator[Path]:
    """A folder whose `workspace` is a small file system of its own."""
    workspace = tmp_path / "case" / "workspace"
    workspace.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "ragtune-test", str(workspace)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("this machine has no `mount`")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield workspace.parent
    finally:
        subprocess.run(["umount", str(workspace)], check=True)


def begin(folder: Path, start: Path, free_bytes: int) -> Path:
    """The prepared index on the small file system, and beside it a file that takes all but so many bytes."""
    workspace = folder / "workspace"
    shutil.rmtree(workspace / "index", ignore_errors=True)
    filler = workspace / "filler"
    filler.unlink(missing_ok=True)
    shutil.copytree(start / "workspace" / "index", workspace / "index")
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, filesystem.free_bytes(str(workspace)) - free_bytes)
    assert filesystem.free_bytes(str(workspace)) == free_bytes
    return workspace


def used_bytes(workspace: Path) -> int:
    return sum(path.stat().st_size for path in workspace.rglob("*") if path.is_file())


def runs_full(folder: Path) -> bool:
    """Whether an upsert fails for want of space, saying so."""
    said = ""
    try:
        upsert(folder)
    except (OSError, RuntimeError) as error:
        said = repr(error)
    assert not said or os.strerror(errno.ENOSPC) in said
    return bool(said)


def test_a_corpus_larger_than_the_disk_is_refused_before_anything_is_written(
    folder: Path,
    starts: dict[str, Path],
) -> None:
    workspace = begin(folder, starts["standing"], 200 * 1024)
    before = used_bytes(workspace)
    large = {f"d{number}": " ".join(["dust"] * 600) for number in range(50)}
    said = r"workspace: no space for the passages: about 0\.3 MiB are needed, 0\.2 MiB are free; free some"
    with pytest.raises(filesystem.SpaceError, match=said):
        upsert(folder, large)
    assert versions.list_versions(str(workspace)) == ["000001", "000002", "000003"]
    assert used_bytes(workspace) == before
    (workspace / "filler").unlink()
    upsert(folder, large)
    assert_converged(workspace, STANDING | large)


def test_wherever_the_disk_runs_full_the_old_contents_stand_and_with_space_the_same_command_succeeds(
    folder: Path,
    starts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(filesystem, "require_space", lambda *_: None)
    num_failed = 0
    for free_bytes in range(0, SIZE_BYTES, STEP_BYTES):
        workspace = begin(folder, starts["standing"], free_bytes)
        if not runs_full(folder):
            break
        num_failed += 1
        assert_whole(workspace, STANDING, STANDING | ADDED)
        assert [*workspace.rglob(".*")] == [], "nothing half-written stays"
        used = [used_bytes(workspace)]
        while len(used) < 2 or used[-1] != used[-2]:
            assert runs_full(folder)
            used.append(used_bytes(workspace))
            # With the folders that an earlier try made, a try may write one file more of its unit.
            assert len(used) <= 5, "a full disk does not get fuller with every try"
        (workspace / "filler").unlink()
        assert not runs_full(folder)
        assert_converged(workspace, STANDING | ADDED)
    assert num_failed > 10
    assert_converged(workspace, STANDING | ADDED)


def test_an_array_that_does_not_fit_is_told_from_any_other_failure(folder: Path, starts: dict[str, Path]) -> None:
    workspace = begin(folder, starts["standing"], 200 * 1024)
    with pytest.raises(OSError, match="No space left") as raised:
        filesystem.save_array(workspace / "large.npy", np.zeros(2**20))
    assert raised.value.errno == errno.ENOSPC
    (workspace / "filler").unlink()
    for array in (np.arange(2**18), np.empty((0, 3), dtype=np.float32), np.asfortranarray(np.eye(3))):
        filesystem.save_array(workspace / "saved.npy", array)
        np.save(workspace / "expected.npy", array)
        assert (workspace / "saved.npy").read_bytes() == (workspace / "expected.npy").read_bytes()
