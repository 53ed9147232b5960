"""SIGKILL at both failpoints of every step of every mode of `tune`, one after another: in the end what an undisturbed one gives.

The verbs are those of `tests.support.tuning_world`, which keep their contracts and need no Ray; that the real ones survive being killed is
shown by the other fault tests.
"""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import tuning_world
from tests.support.processes import warm_process
from tests.support.tuning_world import World

pytestmark = pytest.mark.slow

MODES = ("staged", "joint", "iterative", "domain")
MOST_KILLS = 100


def work(asked: dict[str, Any]) -> None:
    """What a child of the warm process does."""
    World(Path(asked["folder"])).tune(asked["mode"])


Tune = Callable[..., int]


@pytest.fixture(scope="module")
def tune(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tune]:
    """A function that tunes in a process of its own with a failpoint set; its exit code, negative for a signal."""
    log = tmp_path_factory.mktemp("warm") / "log.txt"
    with warm_process("tests.faults.test_tuning_killed", log, "ragtune_ray.cluster.tuning.tune") as ask:

        def run(mode: str, folder: Path, **environment: str) -> int:
            return ask({"mode": mode, "folder": str(folder)}, environment)

        yield run


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, encoder_directory: Path, generator_directory: Path, write_index: Any
) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tuning_world.build(folder, encoder_directory, generator_directory, write_index)
    return folder


def outcome(folder: Path, mode: str) -> Any:
    """What a tune ended with, without timings and without the place of the workspace."""
    current = (folder / "workspace" / "models" / mode / "CURRENT").read_text().strip()
    lines = (folder / "workspace" / "models" / mode / current / "ledger.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    verdicts = [row for row in rows if "accepted" in row]
    shown = ("round", "component", "accepted", "reason", "before", "after", "low", "high", "num_examples")
    return [(row["round"], row["step"]) for row in rows], [{name: row[name] for name in shown} for row in verdicts]


@pytest.mark.parametrize("mode", MODES)
def test_a_tune_killed_at_every_step_ends_as_an_undisturbed_one(
    mode: str, made: Path, tmp_path: Path, tune: Tune
) -> None:
    undisturbed = Path(shutil.copytree(made, tmp_path / "undisturbed"))
    assert tune(mode, undisturbed) == 0
    expected = outcome(undisturbed, mode)
    folder = Path(shutil.copytree(made, tmp_path / "killed"))
    before = tuning_world.index_bytes(folder / "workspace")
    kills = 0
    while kills < MOST_KILLS:
        # The work done and not yet noted; then, done again for nothing, noted and not yet gone on from.
        once = tmp_path / f"once-{kills}"
        failpoint = "tune.noted" if kills % 2 else "tune.worked"
        code = tune(mode, folder, RAGTUNE_FAILPOINT=failpoint, RAGTUNE_FAILPOINT_ONCE=str(once))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert not (folder / "workspace" / "models" / mode / "CURRENT").exists(), "readers see nothing of it yet"
        kills += 1
    assert kills == 2 * len(expected[0]), "each step was killed twice"
    assert outcome(folder, mode) == expected
    assert tuning_world.index_bytes(folder / "workspace") == before
    calls = World(folder).calls()
    assert len(calls) == len(set(calls)) == len(World(undisturbed).calls()), "nothing was done twice"


def test_a_tune_killed_before_readers_were_told_tells_them_when_run_again(
    made: Path, tmp_path: Path, tune: Tune
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "world"))
    assert tune("staged", folder, RAGTUNE_FAILPOINT="tune.published") == -signal.SIGKILL
    assert not (folder / "workspace" / "models" / "staged" / "CURRENT").exists()
    calls = World(folder).calls()
    assert tune("staged", folder) == 0
    assert outcome(folder, "staged")
    assert World(folder).calls() == calls
