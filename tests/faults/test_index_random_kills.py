"""A driver and workers of every kind, killed at random moments of a build: the same bytes."""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import killed_builds
from tests.support.processes import Command, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.long]
logger = logging.getLogger(__name__)

NUM_DOCUMENTS = 600
NUM_KILLS = 6


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config, and an undisturbed build of it in this process."""
    return killed_builds.undisturbed(tmp_path_factory.mktemp("undisturbed"), NUM_DOCUMENTS)


@pytest.mark.parametrize("seed", [0])
def test_a_build_that_is_killed_at_random_moments_ends_with_the_same_bytes(
    settings: dict[str, Any], tmp_path: Path, run: Callable[..., Command], seed: int
) -> None:
    workspace = tmp_path / "workspace"
    here = settings | {"workspace": str(workspace), "cluster": {"address": "local"}}
    source, killed = random.Random(seed), []

    def progress() -> int:
        finished = (workspace.glob(f"index/building/*/{name}/*.json") for name in ("units", "segment"))
        return sum(len(list(paths)) for paths in finished)

    def alive(command: Command) -> dict[str, list[psutil.Process]]:
        found = {name: command.workers(name) for name in killed_builds.WORKERS}
        return {name: processes for name, processes in found.items() if processes}

    command = run("index", here)
    for moment in sorted(source.sample(range(killed_builds.num_steps(settings)), NUM_KILLS)):
        eventually(lambda moment=moment: progress() >= moment, command)
        running = eventually(lambda command=command: alive(command), command)
        kind = source.choice(["driver", *running])
        killed.append(f"{kind} at {progress()}")
        if kind == "driver":
            command.kill()
            command = run("index", here)
        else:
            running[kind][0].kill()
    command.wait()
    logger.info("killed: %s", killed)
    killed_builds.assert_same(str(workspace), settings, NUM_DOCUMENTS)
