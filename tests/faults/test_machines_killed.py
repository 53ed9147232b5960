"""Drivers, workers and machines killed at random moments of a build, on a disk and in a store that fails: the same bytes."""

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest
import yaml

from tests.support import killed_builds
from tests.support import machines as support
from tests.support.machines import Machines, Submitted
from tests.support.processes import eventually
from tests.support.s3_server import Faults

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.machines, pytest.mark.timeout(1500)]
logger = logging.getLogger(__name__)

NUM_DOCUMENTS = 300
NUM_KILLS = 6
UNIT_SECONDS = 2
"""How long each unit takes at least, so that the kills are spread over all of them."""
KINDS = ("driver", "machine", "machine", *killed_builds.WORKERS)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config, and an undisturbed build of it in this process."""
    return killed_builds.undisturbed(tmp_path_factory.mktemp("undisturbed"), NUM_DOCUMENTS)


class Disturbed:
    """A build that is killed again and again.

    Args:
        workspace: of the build.
        start: starts the command, again after its driver was killed.
        seed: of the moments and of what is killed.
    """

    def __init__(self, workspace: str, start: Callable[[], Any], seed: int) -> None:
        self._workspace, self._start, self._random = workspace, start, random.Random(seed)
        self._store, self._path = fsspec.core.url_to_fs(workspace, use_listings_cache=False)
        self.killed: list[str] = []

    def progress(self) -> int:
        """How many units and segments are finished."""
        building = f"{self._path}/index/building/*"
        return sum(len(self._store.glob(f"{building}/{name}/*.json")) for name in ("units", "segment"))

    def run(self, num_steps: int, kill: Callable[[Any, str], bool], kinds: tuple[str, ...]) -> None:
        """Run the build to its end; `kill` kills something of a kind, if there is one just now."""
        command = self._start()
        for moment in sorted(self._random.sample(range(num_steps), NUM_KILLS)):
            self._until(command, moment)
            kind = self._random.choice(kinds)
            while not kill(command, kind):
                kind = self._random.choice(kinds)
            self.killed.append(f"{kind} at {self.progress()} of {num_steps}")
            if kind == "driver":
                command = self._start()
        command.wait()
        logger.info("killed: %s", self.killed)

    def _until(self, command: Any, moment: int) -> None:
        if isinstance(command, Submitted):
            command.until(lambda: self.progress() >= moment)
        else:
            eventually(lambda: self.progress() >= moment, command)


@pytest.fixture
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Two machines, and a store of which each fiftieth request fails and each five-hundredth is answered too late."""
    support.require()
    faults = Faults(0, errors=0.02, stalls=0.002, stall_seconds=20)
    with pytest.MonkeyPatch.context() as patch, Machines([tmp_path_factory.getbasetemp()], faults) as started:
        for name, value in started.store.environment.items():
            patch.setenv(name, value)
        patch.setenv("RAGTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("ragtune")
        for _ in range(2):
            started.add().pause(UNIT_SECONDS)
        yield started
        assert faults.num_failed > 20


@pytest.mark.parametrize("seed", [0])
def test_in_a_store(settings: dict[str, Any], machines: Machines, seed: int) -> None:
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.put_file(settings["corpus"]["path"], "ragtune/corpus.jsonl")
    workspace = "s3://ragtune/workspace"
    there = {**settings, "workspace": workspace}
    there["corpus"] = {**settings["corpus"], "path": "s3://ragtune/corpus.jsonl"}
    (machines.head.folder / "home" / "config.yaml").write_text(yaml.safe_dump(there))
    source = random.Random(seed)
    started: list[Submitted] = []

    def start() -> Submitted:
        job = machines.submit(f"index{len(started)}", "jobs/index.py", f"{machines.seen}/home/config.yaml")
        started.append(job)
        return job

    def kill(job: Submitted, kind: str) -> bool:
        if kind == "driver":
            machines.head.kill_driver("jobs/index.py")
            assert job.process.wait(support.DEADLINE_SECONDS)
            return True
        if kind == "machine":
            source.choice(machines.workers).kill()
            machines.add().pause(UNIT_SECONDS)
            return True
        found = [worker for machine in machines.workers for worker in machine.workers(kind)]
        for worker in source.sample(found, min(1, len(found))):
            worker.kill()
        return bool(found)

    disturbed = Disturbed(workspace, start, seed)
    disturbed.run(killed_builds.num_steps(settings), kill, KINDS)
    killed_builds.assert_same(workspace, settings, NUM_DOCUMENTS)
