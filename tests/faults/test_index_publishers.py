"""Two processes that publish on one base at the same moment: exactly one wins, the other applies its change to the winner's."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree

import pytest
import yaml

from ragtune_ray.index import versions
from tests.support.index_changes import STANDING, Contents, assert_whole, documents_file, texts_of
from tests.support.processes import DEADLINE_SECONDS, ROOT

ONE: Contents = {"comet": "a comet is a ball of ice and dust", "moon": "the moon has no air at all"}
OTHER: Contents = {"probe": "the probe flew past the comet", "rover": "the rover sleeps through the night"}

DRIVER = """
import sys, time
from pathlib import Path
from ragtune_ray import cli
from ragtune_ray.index import versions
from ragtune_ray.storage import failpoints

name, place, barrier, max_rebases, *arguments = sys.argv[1:]
versions.MAX_REBASES = int(max_rebases)

def meet():
    (Path(barrier) / name).touch()
    deadline = time.monotonic() + 300
    while len(list(Path(barrier).iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)

owner, attribute = (versions, "publish_version") if place == "publish_version" else (failpoints, "reach")
real = getattr(owner, attribute)

def held_up(*given):
    if place in (attribute, *given):
        meet()
    return real(*given)

setattr(owner, attribute, held_up)
cli.main(arguments)
"""


class Publisher:
    """`ragtune index upsert` that waits for the other one at a place right before it publishes."""

    def __init__(self, folder: Path, name: str, documents: Contents, place: str, max_rebases: int) -> None:
        config = folder / f"{name}.yaml"
        settings = {
            "workspace": str(folder / "workspace"),
            "encoder": {"model": "hashing-32"},
            "chunking": {"size_tokens": 8, "overlap_tokens": 2},
        }
        config.write_text(yaml.safe_dump(settings))
        verb = ["index", "upsert", str(config), documents_file(folder, documents, name)]
        barrier = folder / "barrier"
        barrier.mkdir(exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, name, place, str(barrier), str(max_rebases), *verb],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """Its exit code and stderr."""
        _, said = self.process.communicate(timeout=DEADLINE_SECONDS)
        return self.process.returncode, said


Publish = Callable[..., list[tuple[int, str]]]


@pytest.fixture
def publish_both(tmp_path: Path, starts: dict[str, Path]) -> Iterator[Publish]:
    """A function that lets two publishers change the prepared index at once; how both ended. None outlives the test."""
    folder = Path(copytree(starts["standing"], tmp_path / "case"))
    started: list[Publisher] = []

    def run(place: str, max_rebases: int = versions.MAX_REBASES) -> list[tuple[int, str]]:
        for name, documents in (("one", ONE), ("other", OTHER)):
            started.append(Publisher(folder, name, documents, place, max_rebases))
        return [publisher.end() for publisher in started]

    yield run
    for publisher in started:
        if publisher.process.poll() is None:
            publisher.process.kill()
            publisher.process.wait(DEADLINE_SECONDS)


@pytest.mark.parametrize("place", ["publish_version", "publish.staged"])
def test_two_upserts_on_one_base_both_hold_and_exactly_one_is_rebased(
    place: str, publish_both: Publish, tmp_path: Path
) -> None:
    ends = publish_both(place)
    assert [code for code, _ in ends] == [0, 0], ends
    rebased = ["another publisher took this version first; this change is rebased on it" in said for _, said in ends]
    assert sorted(rebased) == [False, True], ends
    workspace = tmp_path / "case" / "workspace"
    assert versions.list_versions(str(workspace))[-3:] == ["000003", "000004", "000005"]
    assert versions.current_version(str(workspace)) == "000005"
    assert_whole(workspace, STANDING | ONE | OTHER)
    winner = (ONE, OTHER)[rebased.index(False)]
    assert texts_of(workspace, "000004") == STANDING | winner, "the winner's version is as it published it"
    assert [*(workspace / "index").rglob(".*")] == [], "the loser's staging directory is gone"


def test_a_loser_that_may_not_rebase_fails_by_name_and_its_command_ends_well_when_run_again(
    publish_both: Publish, tmp_path: Path
) -> None:
    ends = publish_both("publish.staged", max_rebases=1)
    assert sorted(code for code, _ in ends) == [0, 1], ends
    loser = 0 if ends[0][0] else 1
    assert "versions/000004: another publisher took this version first; run the command again" in ends[loser][1]
    workspace = tmp_path / "case" / "workspace"
    assert versions.list_versions(str(workspace))[-1] == "000004"
    assert_whole(workspace, STANDING | (OTHER, ONE)[loser])
    again = Publisher(tmp_path / "case", ("one", "other")[loser], (ONE, OTHER)[loser], "publish.staged", 1)
    assert again.end()[0] == 0, "nobody waits at the barrier, both have passed it"
    assert_whole(workspace, STANDING | ONE | OTHER)
