"""What a stage says when the work of a unit fails, and that Ray Data uses all the actors it may."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.data

from ragtune_ray import config
from ragtune_ray.cluster import actors, session, stages
from ragtune_ray.cluster.stages import StageError, run_stage
from ragtune_ray.storage import artifacts

pytestmark = pytest.mark.cluster


def _fail(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    try:
        int("inner")
    except ValueError as error:
        raise artifacts.ArtifactError("shelf/seven: is torn; build it again") from error


class _Failing(stages.UnitWorker):
    def run(self, unit: dict[str, Any]) -> str:
        _fail({"unit": np.array([json.dumps(unit)])})
        return ""


@pytest.mark.parametrize("kind", ["actors", "Ray Data"])
def test_a_failed_unit_reports_its_own_message_without_rays_wrapping(
    tmp_path: Path, shared_ray: None, kind: str
) -> None:
    def transform(units: ray.data.Dataset) -> ray.data.Dataset:
        return units.map_batches(_fail, batch_size=1)

    pool = actors.Pool(_Failing, {}, 2, {"num_cpus": 1})
    work = stages.on_actors(pool) if kind == "actors" else stages.on_ray_data(transform)
    with pytest.raises(StageError) as raised:
        run_stage("shelve", str(tmp_path), [{"unit": 0}, {"unit": 1}], work)
    assert str(raised.value) == "shelve: ArtifactError: shelf/seven: is torn; build it again"
    assert not actors._actors, "an actor in the middle of a unit was not ended"


class _Meeting:
    """An actor whose unit ends when another process is at one, too."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        own = str(os.getpid())
        (self._directory / own).touch()
        deadline = time.monotonic() + 300  # against a hang
        while not any(path.name != own for path in self._directory.iterdir()):
            assert time.monotonic() < deadline, "nobody else came"
            time.sleep(0.05)
        return {"summary": [json.dumps({"unit": json.loads(unit)["unit"], "files": []}) for unit in batch["unit"]]}


def test_a_shrunk_pool_grows_back_to_all_its_actors(tmp_path: Path, shared_ray: None) -> None:
    def transform(units: ray.data.Dataset) -> ray.data.Dataset:
        # Shrunk, as a slow start of what comes before it would do within seconds.
        shrunk = ray.data.ActorPoolStrategy(min_size=1, max_size=2, initial_size=1, max_tasks_in_flight_per_actor=1)
        given = {"directory": str(tmp_path)}
        return units.map_batches(_Meeting, batch_size=1, compute=shrunk, fn_constructor_kwargs=given, num_cpus=1)

    with session.ray_session(config.Cluster()):
        done = run_stage(
            "meet", str(tmp_path / "stage"), [{"unit": number} for number in range(8)], stages.on_ray_data(transform)
        )
    assert [summary["unit"] for summary in done] == list(range(8))
