"""Runs units of work in actors that outlive a stage: starting one costs 6 to 10 core-seconds, nearly all of it for imports.

An actor holds one worker at a time, such as a generator, and frees it before it makes another. The driver gives each actor one
unit at a time. If an actor's process or node is lost, its unit goes to another actor, and a new one is started in its place. A
node that cannot start a worker, for want of its model or of space on the disk, gets no more of them.
Actors reserve cores and GPUs, so other work on Ray calls `release` first, and so does the end of a session.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ragtune_ray import progress
from ragtune_ray.cluster import devices
from ragtune_ray.models import hardware, weights

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
"""A stage fails if this many new actors in a row die before they are ready, other than with their node."""
MAX_LOSSES = 40
"""A pool fails if it loses this many actors per actor of it and finishes no unit in between.

An actor is ready before it loads a model, so a model that does not fit in memory kills each new one. The bound is above what
rows that kill their worker need: `ATTEMPTS_TOGETHER` of `answering.workers` and one per row of a unit (`answer.unit_queries`).
"""
GROW_SECONDS = 10.0
"""How often a pool that may grow looks for nodes that have joined."""
MAX_WAIT_SECONDS = 1800
"""A stage fails if for this long no unit runs because no actor can start. A growing cluster may need minutes."""
MAX_AVOIDED = 3
"""A stage fails if so many nodes cannot start its worker; then the reason is hardly that of a node."""
NODE_ID = "ray.io/node-id"
"""The label in which Ray names a node."""


left_out: set[str] = set()
"""Ids of nodes that get no work in this session."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Up to `num_actors` actors that run units in workers of one class."""

    worker: type
    """A `stages.UnitWorker`."""
    arguments: dict[str, Any]
    """The arguments of its constructor."""
    num_actors: int
    options: dict[str, Any]
    """The resources that each actor reserves."""
    room: Callable[[], int] | None = None
    """Returns how many actors the cluster has room for now, since nodes may join; None: `num_actors`, to the end."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Where the workers find their models, from `session.models`."""


def run(pool: Pool, units: Sequence[str]) -> Iterator[str]:
    """Run units (JSON) in a pool, and yield the result of each, in any order.

    An actor that Ray cannot schedule yet delays no unit, as long as the pool has another one.

    Raises:
        RayError: a worker raised an exception, or actors cannot be started.
    """
    try:
        yield from _Stage(pool, units).results()
    except BaseException:
        release()  # some actors are in the middle of a unit
        raise


def release() -> None:
    """End all actors, so that what they reserve is free for others."""
    for actor in [*_actors]:
        actor.end()


@dataclass(eq=False, slots=True)
class _Actor:
    """The driver's record of an actor."""

    options: dict[str, Any]
    handle: Any
    is_ready: bool = False
    """Whether it has ever answered."""
    node: str = ""
    """Id of its node, once it has answered."""
    num_lost_nodes: int = 0
    """How many nodes the cluster had lost when it was started."""

    def end(self) -> None:
        import ray

        _actors.remove(self)
        if ray.is_initialized():
            ray.kill(self.handle)


_actors: list[_Actor] = []
"""All actors of the session."""


class _Stage:
    """A pool at work."""

    def __init__(self, pool: Pool, units: Sequence[str]) -> None:
        self._pool = pool
        self._waiting = deque(units)
        self._idle: list[_Actor] = []
        self._busy: dict[Any, tuple[_Actor, str | None]] = {}
        """Reference to a result -> actor, and its unit (None: the actor is starting)."""
        self._unfinished, self._failed_starts = len(units), 0
        self._losses = 0
        """Actors that were lost since the last finished unit."""
        self._avoided: set[str] = set()
        """Ids of nodes that cannot start the worker."""
        self._looked = self._heard = time.monotonic()
        """When the room for actors was asked for, and when an actor answered."""
        reserved = _reserve(pool, len(units))
        self._num_actors = len(reserved)
        for actor in reserved:
            self._expect(actor)

    def results(self) -> Iterator[str]:
        """The result of each unit."""
        while self._unfinished:
            self._grow()
            self._submit()
            result = self._next_result()
            if result is not None:
                self._unfinished -= 1
                yield result

    def _expect(self, actor: _Actor) -> None:
        """Let an actor serve the pool, and be idle as soon as it answers."""
        pool = self._pool
        self._busy[actor.handle.serve.remote(pool.worker, pool.arguments, pool.models)] = (actor, None)

    def _grow(self) -> None:
        """Start more actors if nodes have joined; looks for them every `GROW_SECONDS`."""
        if self._pool.room is None or not self._waiting or time.monotonic() < self._looked + GROW_SECONDS:
            return
        self._looked = time.monotonic()
        starting = sum(unit is None for _, unit in self._busy.values())
        wanted = min(self._pool.room() - self._num_actors, len(self._waiting) - len(self._idle) - starting)
        for _ in range(wanted):
            self._expect(_start(self._pool.options, self._avoided))
        self._num_actors += max(0, wanted)

    def _submit(self) -> None:
        """Give waiting units to idle actors."""
        while self._idle and self._waiting:
            actor, unit = self._idle.pop(), self._waiting.popleft()
            # Ray shows the name of a task in its dashboard and in the title of the process.
            task = actor.handle.run.options(name=self._pool.worker.__name__)
            self._busy[task.remote(unit)] = (actor, unit)

    def _next_result(self) -> str | None:
        """Wait until an actor answers or is lost; returns the result if it has finished a unit."""
        import ray
        import ray.exceptions

        longest = self._heard + MAX_WAIT_SECONDS - time.monotonic()
        ready, _ = ray.wait([*self._busy], num_returns=1, timeout=max(0.0, min(GROW_SECONDS, longest)))
        if not ready:
            if longest <= GROW_SECONDS:
                self._refuse_endless_wait()
                self._heard = time.monotonic()
            return None
        self._heard = time.monotonic()
        actor, unit = self._busy.pop(ready[0])
        try:
            result: str | None = ray.get(ready[0])
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.OutOfMemoryError) as error:
            self._replace(actor, unit, error)
            return None
        except ray.exceptions.RayTaskError:
            if unit is None or not self._avoid_node(actor, unit):
                raise
            return None
        self._failed_starts, actor.is_ready = 0, True
        if unit is None:
            actor.node, result = result or "", None
        else:
            self._losses = 0
        self._idle.append(actor)
        return result

    def _replace(self, lost: _Actor, unit: str | None, error: Exception) -> None:
        """Start an actor in the place of one that was lost, and let its unit wait for the next free one."""
        self._losses += 1
        if self._losses >= MAX_LOSSES * self._num_actors:
            _refuse_endless_losses(self._pool, self._losses, error)
        if lost.is_ready:
            self._failed_starts = 0
        elif lost.num_lost_nodes == _num_lost_nodes():  # a node that is lost takes all its actors along
            self._failed_starts += 1
        if self._failed_starts == MAX_FAILED_STARTS:
            raise error
        if unit is not None:
            logger.warning("a worker process was lost and is replaced; its unit is repeated: %s", error)
            self._waiting.appendleft(unit)
        lost.end()
        self._expect(_start(lost.options, self._avoided))

    def _avoid_node(self, actor: _Actor, unit: str) -> bool:
        """Start another actor on another node, if the node of this one could not make a worker; False if that is no remedy."""
        import ray

        reason = ray.get(actor.handle.why_no_worker.remote())
        if not reason or not _has_room(actor.options, self._avoided | {actor.node}):
            return False
        if actor.node not in self._avoided:
            self._avoided.add(actor.node)
            if len(self._avoided) == MAX_AVOIDED:
                return False
            progress.say(f"node {actor.node[:12]} cannot start {self._pool.worker.__name__} and gets no more: {reason}")
        self._waiting.appendleft(unit)
        actor.end()
        self._expect(_start(actor.options, self._avoided))
        return True

    def _refuse_endless_wait(self) -> None:
        """Raise GetTimeoutError if every actor is still starting."""
        import ray.exceptions

        if all(unit is None for _, unit in self._busy.values()):
            raise ray.exceptions.GetTimeoutError(
                f"no actor with the resources {self._pool.options} could start within {MAX_WAIT_SECONDS} seconds; "
                "lower the settings of section cluster, or add nodes"
            )


def _refuse_endless_losses(pool: Pool, losses: int, error: Exception) -> None:
    """Raise RayError, since new actors of this pool only die as well."""
    import ray.exceptions

    raise ray.exceptions.RayError(
        f"{losses} worker processes ({pool.worker.__name__}) in a row were lost, with no finished unit between; "
        "often the model does not fit in memory: use a smaller one, lower the numbers of workers in section cluster, or add "
        f"memory. The last: {' '.join(str(error).split())}"
    )


def _reserve(pool: Pool, num_units: int) -> list[_Actor]:
    """The actors of a pool, at most one per unit: those that exist, then new ones.

    Other actors are ended if they reserve different resources, since the pool may need these; otherwise they only free
    their worker.
    """
    count = min(pool.num_actors, num_units)
    reserved = [actor for actor in _actors if actor.options == pool.options][:count]
    for actor in [*_actors]:
        if any(actor.options.values()) and actor.options != pool.options:
            actor.end()
        elif actor not in reserved:
            actor.handle.free.remote()
    return reserved + [_start(pool.options) for _ in range(count - len(reserved))]


def _start(options: dict[str, Any], avoided: Collection[str] = ()) -> _Actor:
    import ray

    placed = ray.remote(StageActor).options(scheduling_strategy="SPREAD", **options, **elsewhere(avoided))
    actor = _Actor(options, placed.remote(), num_lost_nodes=_num_lost_nodes())
    _actors.append(actor)
    return actor


def _num_lost_nodes() -> int:
    import ray

    return sum(not node["Alive"] for node in ray.nodes())


def elsewhere(avoided: Collection[str] = ()) -> dict[str, Any]:
    """Options of Ray that keep a task or actor from the nodes with these ids, and from those of `left_out`."""
    avoided = left_out.union(avoided)
    return {"label_selector": {NODE_ID: f"!in({','.join(sorted(avoided))})"}} if avoided else {}


def _has_room(options: Mapping[str, Any], avoided: Collection[str]) -> bool:
    """Whether an actor with these resources fits on another node, if nothing else runs on it."""
    import ray

    needs = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0), "memory": options.get("memory", 0)}
    return any(
        node["Alive"]
        and node["NodeID"] not in left_out.union(avoided)
        and all(node["Resources"].get(kind, 0) >= need for kind, need in needs.items())
        for node in ray.nodes()
    )


class StageActor:
    """The actor: it runs units in the worker that it holds."""

    def __init__(self) -> None:
        self._worker: Any = None
        self._holds: tuple[type, dict[str, Any]] | None = None
        """Class and arguments of the worker that it holds."""
        self._serves: tuple[type, dict[str, Any]] | None = None
        """Class and arguments of the worker for the units to come."""

        self._why_no_worker = ""

    def serve(self, worker: type, arguments: dict[str, Any], models: Mapping[str, str]) -> str:
        """Do the units to come in a worker with these arguments; it is made with the first one. Returns the id of the node."""
        devices.use_reserved_devices()
        weights.use_staged(models)
        self._serves = (worker, arguments)
        return devices.node_id()

    def why_no_worker(self) -> str:
        """Why the worker of the last unit could not be made; empty if it could."""
        return self._why_no_worker

    def run(self, unit: str) -> str:
        """Do a unit, in the worker that it holds if that has the arguments to serve, or can take them over."""
        assert self._serves is not None
        if self._holds is not self._serves:
            worker, arguments = self._serves
            is_alike = self._holds is not None and self._holds[0] is worker
            if self._holds != self._serves and not (is_alike and self._worker.continues_with(arguments)):
                self.free()
                self._make(worker, arguments)
            self._holds = self._serves
        result: str = self._worker.run(json.loads(unit))
        return result

    def _make(self, worker: type, arguments: dict[str, Any]) -> None:
        try:
            self._worker = worker(**arguments)
            self._why_no_worker = ""
        except Exception as error:
            self._why_no_worker = " ".join(f"{type(error).__name__}: {error}".split())
            raise

    def free(self) -> None:
        """Drop the worker and return its memory."""
        self._worker = self._holds = None
        gc.collect()  # models and open indexes are in reference cycles
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        hardware.return_freed_memory()
