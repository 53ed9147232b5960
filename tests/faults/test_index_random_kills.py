"""A driver and workers of every kind, killed at random moments of a build: the same bytes."""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ragtune_ray import config
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.index import contents
from tests.support.corpora import write_corpus
from tests.support.indexes import living, segment_manifests
from tests.support.processes import Command, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
logger = logging.getLogger(__name__)

NUM_DOCUMENTS = 600
NUM_KILLS = 6
WORKERS = ("EmbedUnits", "ReadUnits", "CommitUnits", "_build_segment")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config, and an undisturbed build of it in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_corpus(folder / "corpus.jsonl", NUM_DOCUMENTS)
    found = {
        "workspace": str(folder / "workspace"),
        "corpus": {"path": str(folder / "corpus.jsonl"), "unit_bytes": 2000},
        "encoder": {"model": "hashing-64", "unit_passages": 16},
        "chunking": {"size_tokens": 32, "overlap_tokens": 4},
        "index": {"kind": "ivf", "segment_passages": 150},
    }
    build_index(config.Config.model_validate(found))
    return found


def num_steps(settings: dict[str, Any]) -> int:
    """Units and segments of the build, but for the last ones."""
    num_units = Path(settings["corpus"]["path"]).stat().st_size // settings["corpus"]["unit_bytes"]
    return num_units + len(segment_manifests(settings["workspace"])) - 3


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
        found = {name: command.workers(name) for name in WORKERS}
        return {name: processes for name, processes in found.items() if processes}

    command = run("index", here)
    for moment in sorted(source.sample(range(num_steps(settings)), NUM_KILLS)):
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
    assert segment_manifests(workspace) == segment_manifests(settings["workspace"])
    assert living(str(workspace)) == {f"d{number}" for number in range(NUM_DOCUMENTS)}
    assert contents.index_problems(str(workspace)) == []
