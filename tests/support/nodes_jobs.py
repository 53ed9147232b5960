"""Drivers that a test starts on a cluster of several nodes; each prints one line of JSON."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ragtune_ray import config
from ragtune_ray.cluster import actors, session, stages
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.models import weights
from tests.support import stores  # noqa: F401 - registers folder:// in drivers and workers

DEADLINE_SECONDS = 120  # against a hang


def node() -> str:
    """The id of this process's node."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


class Opening(stages.UnitWorker):
    """Opens a model."""

    def __init__(self, name: str) -> None:
        self._model = weights.resolve(name)

    def run(self, unit: dict[str, Any]) -> str:
        """Say where the model is and what it is."""
        return json.dumps([unit["unit"], node(), str(self._model.directory), self._model.fingerprint])


def models(workspace: str, name: str) -> Any:
    """Stage a model that no other node has, and open it in actors on all nodes."""
    settings = config.Config().using(f"workspace={workspace}")
    model = weights.resolve(name)
    with session.ray_session(settings.cluster):
        _wait_for_nodes()
        staged = session.models(settings)
        shutil.rmtree(name)
        pool = actors.Pool(Opening, {"name": name}, 6, {"num_cpus": 1}, models=staged)
        found = sorted(json.loads(each) for each in actors.run(pool, [json.dumps({"unit": n}) for n in range(40)]))
    return {"fingerprint": model.fingerprint, "found": found}


def index(folder: str, name: str, joining: str = "") -> Any:
    """Build an index with a model that only the working directory of this process has.

    With `joining`, nodes are not asked for it before the build, as if they joined later.
    """
    os.chdir(folder)
    given = [f"workspace=folder://{folder}/store", f"encoder.model={name}", f"corpus.path={folder}/corpus.jsonl"]
    settings = config.Config().using(*given, "corpus.unit_bytes=2000", "cluster.encoder_workers=3")
    with session.ray_session(settings.cluster):
        _wait_for_nodes()
        if joining:
            _ask_nodes_late()
        build_index(settings)
        return len(actors.left_out)


def _ask_nodes_late() -> None:
    """Let the first question which nodes can open the models find none that cannot."""
    ask = session.leave_out_nodes_without

    def answer(_: dict[str, str]) -> None:
        session.leave_out_nodes_without = ask

    session.leave_out_nodes_without = answer


def _wait_for_nodes() -> None:
    """Wait until all three have joined."""
    import ray

    deadline = time.monotonic() + DEADLINE_SECONDS
    while ray.cluster_resources().get("CPU", 0) < 6:
        assert time.monotonic() < deadline, "not all nodes join"
        time.sleep(0.1)


class Meeting(stages.UnitWorker):
    """Waits until workers on two nodes are at work."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def run(self, unit: dict[str, Any]) -> str:
        """Say on which node it ran."""
        (self._folder / node()).touch()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len([*self._folder.iterdir()]) < 2:
            assert time.monotonic() < deadline, "no second node gets work"
            time.sleep(0.05)
        return json.dumps([unit["unit"], node()])


def growing(folder: str) -> Any:
    """Run units that need a node which joins later."""
    settings = config.Config()
    with session.ray_session(settings.cluster):
        pool = session.pool(Meeting, {"folder": folder}, 0, settings.cluster)
        found = [json.loads(each) for each in actors.run(pool, [json.dumps({"unit": n}) for n in range(40)])]
    return {"nodes": sorted({each for _, each in found}), "units": sorted(unit for unit, _ in found)}


def environment(*variables: str) -> Any:
    """The variables that a worker has, and which of them its process began with."""
    settings = config.Config().using(f"cluster.worker_variables=[{', '.join(variables)}]")
    with session.ray_session(settings.cluster, for_training=True):
        import ray

        def look() -> dict[str, Any]:
            begun = Path("/proc/self/environ").read_bytes().decode(errors="replace").split("\0")
            return {
                "now": dict(os.environ),
                "address": ray.util.get_node_ip_address(),
                "begun": dict(each.partition("=")[::2] for each in begun if each),
            }

        return ray.get(ray.remote(num_cpus=1)(look).remote(), timeout=DEADLINE_SECONDS)


def main() -> None:
    """Run the driver that the arguments name."""
    drivers = {"models": models, "index": index, "growing": growing, "environment": environment}
    sys.stdout.write(json.dumps(drivers[sys.argv[1]](*sys.argv[2:])) + "\n")
