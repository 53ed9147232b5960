"""Actors that stay for the next stage: what they hold, what they reserve, and what happens when they are lost."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.cluster import actors, session, stages

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]

ONE_CORE = {"num_cpus": 1}
DEADLINE_SECONDS = 300  # against a hang


@pytest.fixture(autouse=True)
def without_actors(shared_ray: None) -> Iterator[None]:
    """No actors of another test, before and after."""
    actors.release()
    yield
    actors.release()


class Noting(stages.UnitWorker):
    """Returns the process and the names of all workers that exist in it."""

    alive: set[str] = set()  # noqa: RUF012 - of the process

    def __init__(self, name: str) -> None:
        assert not self.alive, "the worker before was not dropped first"
        self._itself = self  # only the garbage collector frees it
        self._name = name
        self.alive.add(name)

    def __del__(self) -> None:
        self.alive.discard(self._name)

    def run(self, unit: dict[str, Any]) -> str:
        """Return what is here."""
        here = {"process": os.getpid(), "alive": sorted(self.alive), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
        return json.dumps({"unit": unit["unit"], "files": [], **here})


def results(pool: actors.Pool, num_units: int = 8) -> list[dict[str, Any]]:
    units = [json.dumps({"unit": number}) for number in range(num_units)]
    return sorted(map(json.loads, actors.run(pool, units)), key=lambda found: found["unit"])


def processes(found: list[dict[str, Any]]) -> set[int]:
    return {each["process"] for each in found}


def test_the_next_stage_uses_the_same_processes_and_each_holds_one_worker() -> None:
    first = results(actors.Pool(Noting, {"name": "first"}, 2, ONE_CORE))
    second = results(actors.Pool(Noting, {"name": "second"}, 2, ONE_CORE))
    assert [each["unit"] for each in first] == list(range(8))
    assert {each["gpus"] for each in first} == {""}, "an actor that reserved no GPU sees none"
    assert len(processes(first) | processes(second)) <= 2
    assert processes(first) & processes(second)
    assert {tuple(each["alive"]) for each in first} == {("first",)}
    assert {tuple(each["alive"]) for each in second} == {("second",)}


class Counting(Noting):
    """Returns how many of its class were made in the process."""

    made = 0

    def __init__(self, name: str) -> None:
        super().__init__(name)
        Counting.made += 1

    def run(self, unit: dict[str, Any]) -> str:
        """Return the number."""
        return json.dumps({"unit": unit["unit"], "made": self.made})


def test_a_worker_of_the_same_arguments_is_not_made_again() -> None:
    pool = actors.Pool(Counting, {"name": "one"}, 1, ONE_CORE)
    assert [each["made"] for each in [*results(pool), *results(pool)]] == [1] * 16


def test_other_resources_release_the_actors_that_hold_the_cores() -> None:
    before = results(actors.Pool(Noting, {"name": "small"}, 4, ONE_CORE))
    after = results(actors.Pool(Noting, {"name": "large"}, 1, {"num_cpus": 4}))
    assert not processes(before) & processes(after)


@pytest.mark.parametrize("ended_by", ["release", "session"])
def test_all_cores_are_free_afterwards(ended_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    results(actors.Pool(Noting, {"name": "all cores"}, 4, ONE_CORE))
    if ended_by == "session":
        monkeypatch.setattr(session, "_open", [])  # as if the session of `shared_ray` had not been opened
        with session.ray_session(config.Cluster()):
            results(actors.Pool(Noting, {"name": "all cores"}, 4, ONE_CORE))
    else:
        actors.release()
    assert ray.get(ray.remote(num_cpus=4)(lambda: "ran").remote(), timeout=DEADLINE_SECONDS) == "ran"


def test_actors_without_room_delay_nothing() -> None:
    found = results(actors.Pool(Noting, {"name": "six, of which four fit"}, 6, ONE_CORE))
    assert [each["unit"] for each in found] == list(range(8))
    assert len(processes(found)) <= 4


class Dying(stages.UnitWorker):
    """Kills its process the first time that it gets unit 3."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)

    def run(self, unit: dict[str, Any]) -> str:
        """Die, or answer."""
        note = self._directory / str(unit["unit"])
        if unit["unit"] == 3 and not note.exists():
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return json.dumps({"unit": unit["unit"]})


@pytest.mark.parametrize("num_actors", [1, 2])
def test_the_unit_of_a_killed_process_is_repeated(tmp_path: Path, num_actors: int) -> None:
    found = results(actors.Pool(Dying, {"directory": str(tmp_path)}, num_actors, ONE_CORE))
    assert found == [{"unit": number} for number in range(8)]
    assert (tmp_path / "3").exists()


def test_an_idle_process_that_was_killed_is_replaced() -> None:
    pool = actors.Pool(Noting, {"name": "killed"}, 1, ONE_CORE)
    (killed,) = processes(results(pool))
    os.kill(killed, signal.SIGKILL)
    (found,) = processes(results(pool))
    assert found != killed


def test_a_stage_fails_if_no_actor_ever_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(actors.StageActor):
        def __init__(self) -> None:
            raise ImportError("no module named ragtune_ray")

    monkeypatch.setattr(actors, "StageActor", Broken)
    work = stages.on_actors(actors.Pool(Noting, {"name": "never"}, 1, ONE_CORE))
    with pytest.raises(stages.StageError, match=r"^broken: ImportError: no module named ragtune_ray$"):
        stages.run_stage("broken", str(tmp_path), [{"unit": 0}], work)


def test_a_stage_fails_if_the_cluster_has_no_such_resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "MAX_WAIT_SECONDS", 1)
    work = stages.on_actors(actors.Pool(Noting, {"name": "never"}, 1, {"num_cpus": 1, "num_gpus": 1}))
    with pytest.raises(stages.StageError, match=r"^large: no actor with the resources .*'num_gpus': 1.* lower"):
        stages.run_stage("large", str(tmp_path), [{"unit": 0}], work)


class Computing(stages.UnitWorker):
    """Imports torch before it limits its threads, as a worker does that is not the first of its process."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(3)
        session.use_one_thread()

    def run(self, unit: dict[str, Any]) -> str:
        """Return the number of threads that torch and FAISS use."""
        import faiss
        import torch

        return json.dumps({"unit": unit["unit"], "threads": [torch.get_num_threads(), faiss.omp_get_max_threads()]})


def test_a_later_worker_of_a_process_computes_on_one_thread() -> None:
    found = results(actors.Pool(Computing, {}, 1, ONE_CORE), num_units=1)
    assert found == [{"unit": 0, "threads": [1, 1]}]
