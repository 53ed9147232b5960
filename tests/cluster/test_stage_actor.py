"""Which worker an actor holds, tested in this process."""

import functools
import json
import types
from collections.abc import Callable
from typing import Any

import pytest
import ray
import ray.exceptions

from ragtune_ray import config
from ragtune_ray.cluster import actors, stages
from ragtune_ray.cluster.actors import StageActor
from ragtune_ray.cluster.answering import workers
from ragtune_ray.generation import generator


class Loading(stages.UnitWorker):
    """Loads a model, which some later arguments need as well."""

    loaded: list[str] = []  # noqa: RUF012 - of all workers
    alive = 0

    def __init__(self, model: str, job: str) -> None:
        assert Loading.alive == 0, "the worker before is still in memory"
        self._itself = self  # only the garbage collector frees it
        self._model, self._job = model, job
        Loading.alive += 1
        self.loaded.append(model)

    def __del__(self) -> None:
        Loading.alive -= 1

    def continues_with(self, arguments: dict[str, Any]) -> bool:
        """Take over a job of the same model."""
        if arguments["model"] != self._model:
            return False
        self._job = arguments["job"]
        return True

    def run(self, unit: dict[str, Any]) -> str:
        """Say what ran the unit."""
        return f"{type(self).__name__} {self._model} {self._job} {unit['unit']}"


class Other(Loading):
    """A worker of another class."""


def test_an_actor_loads_a_model_once_and_frees_it_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loading, "loaded", [])
    actor = StageActor()

    def run(kind: type, arguments: dict[str, str], unit: int) -> str:
        actor.serve(kind, arguments, {})
        return actor.run(json.dumps({"unit": unit}))

    given = [(Loading, "a", "1"), (Loading, "a", "1"), (Loading, "a", "2"), (Loading, "b", "2"), (Other, "b", "2")]
    said = [run(kind, {"model": model, "job": job}, 7) for kind, model, job in given]
    assert said == [f"{kind.__name__} {model} {job} 7" for kind, model, job in given]
    assert Loading.loaded == ["a", "b", "b"]
    assert Loading.alive == 1
    actor.free()
    assert Loading.alive == 0
    assert run(Other, {"model": "b", "job": "3"}, 8) == "Other b 3 8"
    assert Loading.loaded == ["a", "b", "b", "b"]
    actor.free()


@pytest.mark.parametrize(
    ("override", "fingerprint", "continues"),
    [
        ("answer.arm=base", "f", True),
        ("prompt.max_tokens=99", "f", True),
        ("generator.model=elsewhere", "f", False),
        ("generator.max_new_tokens=3", "f", False),
        ("answer.arm=base", "files changed", False),
    ],
)
def test_a_generator_continues_with_every_job_of_its_model(
    monkeypatch: pytest.MonkeyPatch, override: str, fingerprint: str, continues: bool
) -> None:
    monkeypatch.setattr(generator, "open_generator", lambda _: (object(), ""))
    monkeypatch.setattr(workers.session, "use_one_thread", lambda: None)
    settings = config.Config()
    first = {"settings": settings, "version": "000001", "queries": "q", "directory": "d", "fingerprint": "f"}
    later = {
        "settings": settings.using(override),
        "version": "000002",
        "queries": "other queries",
        "directory": "other directory",
        "fingerprint": fingerprint,
    }
    continued = workers.GenerateUnit(**first)
    assert continued.continues_with(later) is continues
    if continues:
        made, taken = vars(workers.GenerateUnit(**later)), vars(continued)
        assert {name: taken[name] for name in taken if name != "_generator"} == {
            name: made[name] for name in made if name != "_generator"
        }


class Handle:
    """In place of a handle of Ray: a result is the function that returns it or raises."""

    def __init__(self, run: Callable[[str], str]) -> None:
        self.serve = self.run = self
        self._run = run

    def options(self, **_: object) -> "Handle":
        """Return a task."""
        return self

    def remote(self, *arguments: Any) -> Callable[[], Any]:
        """Start a task: with a unit, or with a class and its arguments to serve."""
        return lambda: self._run(*arguments) if len(arguments) == 1 else None


def work(monkeypatch: pytest.MonkeyPatch, run: Callable[[str], str], num_units: int, num_actors: int = 1) -> list[str]:
    """The results of a stage whose actors are always ready and do `run`."""

    def start(options: dict[str, Any], *_: object) -> actors._Actor:
        actors._actors.append(actors._Actor(options, Handle(run)))
        return actors._actors[-1]

    monkeypatch.setattr(actors, "_actors", [])
    monkeypatch.setattr(actors, "_start", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "wait", lambda busy, **_: (busy[:1], busy[1:]))
    monkeypatch.setattr(ray, "get", lambda result: result())
    pool = actors.Pool(Loading, {}, num_actors, {})
    return sorted(actors.run(pool, [str(number) for number in range(num_units)]))


@pytest.mark.parametrize("num_actors", [1, 3])
def test_a_pool_whose_actors_all_die_while_they_load_fails(monkeypatch: pytest.MonkeyPatch, num_actors: int) -> None:
    attempts = []

    def out_of_memory(unit: str) -> str:
        attempts.append(unit)
        assert len(attempts) < 1000, "replaced forever"
        raise ray.exceptions.OutOfMemoryError("killed to free memory")

    with pytest.raises(ray.exceptions.RayError, match=r"^\d+ worker .*\(Loading\) in a row.*memory: .*killed to free"):
        work(monkeypatch, out_of_memory, 8, num_actors)
    assert len(attempts) == actors.MAX_LOSSES * num_actors


@pytest.mark.parametrize("lost_with_node", [True, False])
def test_actors_that_die_with_their_node_are_no_failed_starts(
    monkeypatch: pytest.MonkeyPatch, lost_with_node: bool
) -> None:
    """Five of six actors wait on a node that is lost; or they die on nodes that are alive."""
    nodes = [{"Alive": True}, {"Alive": True}]

    def dies() -> None:
        if lost_with_node:
            nodes[1]["Alive"] = False
        raise ray.exceptions.RayActorError

    def start(options: dict[str, Any], *_: object) -> actors._Actor:
        handle = Handle(lambda unit: unit)
        if 1 <= len(started) <= 5:
            handle.serve = types.SimpleNamespace(remote=lambda *_: functools.partial(dies))
        started.append(actors._Actor(options, handle, num_lost_nodes=actors._num_lost_nodes()))
        actors._actors.append(started[-1])
        return started[-1]

    started: list[actors._Actor] = []
    monkeypatch.setattr(actors, "_actors", [])
    monkeypatch.setattr(actors, "_start", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "wait", lambda busy, **_: (busy[:1], busy[1:]))
    monkeypatch.setattr(ray, "get", lambda result: result())
    pool = actors.Pool(Loading, {}, 6, {})
    if lost_with_node:
        assert sorted(actors.run(pool, list("0123456789"))) == list("0123456789")
        return
    with pytest.raises(ray.exceptions.RayActorError):
        list(actors.run(pool, list("0123456789")))


def test_a_pool_grows_when_a_node_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second node joins while the first of six units is done; there is never room for more actors than units."""
    started: list[int] = []
    done: list[str] = []

    def start(options: dict[str, Any], *_: object) -> actors._Actor:
        started.append(len(done))
        actors._actors.append(actors._Actor(options, Handle(lambda unit: done.append(unit) or unit)))
        return actors._actors[-1]

    monkeypatch.setattr(actors, "_actors", [])
    monkeypatch.setattr(actors, "_start", start)
    monkeypatch.setattr(actors, "GROW_SECONDS", 0.0)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "wait", lambda busy, **_: (busy[:1], busy[1:]))
    monkeypatch.setattr(ray, "get", lambda result: result())
    pool = actors.Pool(Loading, {}, 1, {}, lambda: 9 if done else 1)
    assert sorted(actors.run(pool, list("012345"))) == list("012345")
    assert started == [0, 1, 1, 1, 1], "the first takes one of the five units that are left"


def test_units_that_kill_a_worker_for_each_of_their_rows_are_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    deaths = workers.ATTEMPTS_TOGETHER + config.Answer().unit_queries
    left = {str(unit): deaths for unit in range(6)}

    def deadly(unit: str) -> str:
        left[unit] -= 1
        if left[unit] >= 0:
            raise ray.exceptions.RayActorError
        return unit

    assert work(monkeypatch, deadly, 6, 2) == list("012345")
    assert left == dict.fromkeys("012345", -1)


def work_on_nodes(monkeypatch: pytest.MonkeyPatch, num_nodes: int, broken: set[str], why: str = "no disk") -> list[str]:
    """The nodes that did the units of a stage, of which some cannot make a worker (or fail units, if `why` is "")."""
    done: list[str] = []
    names = [f"n{number}" for number in range(num_nodes)]

    def start(options: dict[str, Any], avoided: Any = ()) -> actors._Actor:
        node = [name for name in names if name not in avoided][len(actors._actors) % (num_nodes - len(avoided))]

        def run(unit: str) -> str:
            if node in broken:
                raise ray.exceptions.RayTaskError("run", "a traceback", OSError("no space"))
            done.append(node)
            return unit

        handle = Handle(run)
        handle.serve = types.SimpleNamespace(remote=lambda *_: lambda: node)
        handle.why_no_worker = types.SimpleNamespace(remote=lambda: lambda: why)
        actors._actors.append(actors._Actor(options, handle))
        return actors._actors[-1]

    monkeypatch.setattr(actors, "_actors", [])
    monkeypatch.setattr(actors, "_start", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    nodes = [{"Alive": True, "NodeID": name, "Resources": {"CPU": 2.0}} for name in names]
    head = {"Alive": True, "NodeID": "head", "Resources": {}}
    monkeypatch.setattr(ray, "nodes", lambda: [head, *nodes])
    monkeypatch.setattr(ray, "wait", lambda busy, **_: (busy[:1], busy[1:]))
    monkeypatch.setattr(ray, "get", lambda result: result())
    pool = actors.Pool(Loading, {}, 6, {"num_cpus": 1})
    assert sorted(actors.run(pool, [str(unit) for unit in range(9)])) == list("012345678")
    return done


def test_a_node_that_cannot_make_a_worker_gets_no_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(work_on_nodes(monkeypatch, 4, {"n1", "n2"})) == {"n0", "n3"}
    said = capsys.readouterr().err
    assert said.count("cannot start Loading and gets no more: no disk") == 2, "once for each of two nodes"


@pytest.mark.parametrize(
    ("num_nodes", "broken", "why"),
    [
        (1, {"n0"}, "no disk"),  # no other node; the head has no cores
        (2, {"n0", "n1"}, "no disk"),
        (9, {"n0", "n1", "n2", "n3"}, "no disk"),  # three nodes are not at fault
        (4, {"n0"}, ""),  # the worker was made, and failed at its unit
    ],
)
def test_an_error_that_is_not_of_a_node_ends_the_stage(
    monkeypatch: pytest.MonkeyPatch, num_nodes: int, broken: set[str], why: str
) -> None:
    with pytest.raises(ray.exceptions.RayTaskError):
        work_on_nodes(monkeypatch, num_nodes, broken, why)
