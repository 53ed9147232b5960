"""Which worker an actor holds, tested in this process."""

import json
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.cluster import stages
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
    given = [(Loading, "a", "1"), (Loading, "a", "1"), (Loading, "a", "2"), (Loading, "b", "2"), (Other, "b", "2")]
    said = [actor.run(kind, {"model": model, "job": job}, json.dumps({"unit": 7})) for kind, model, job in given]
    assert said == [f"{kind.__name__} {model} {job} 7" for kind, model, job in given]
    assert Loading.loaded == ["a", "b", "b"]
    assert Loading.alive == 1
    actor.free()
    assert Loading.alive == 0
    assert actor.run(Other, {"model": "b", "job": "3"}, json.dumps({"unit": 8})) == "Other b 3 8"
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
