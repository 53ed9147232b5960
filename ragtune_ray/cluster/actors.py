"""Runs units of work in actors that outlive a stage: starting one costs 6 to 10 core-seconds, nearly all of it for imports.

An actor holds one worker at a time, such as a generator, and frees it before it makes another. The driver gives each actor one
unit at a time. If an actor's process or node is lost, its unit goes to another actor, and a new one is started in its place.
Actors reserve cores and GPUs, so other work on Ray calls `release` first, and so does the end of a session.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ragtune_ray.cluster import devices
from ragtune_ray.models import hardware

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
"""A stage fails if this many new actors in a row die before they are ready."""
MAX_LOSSES = 40
"""A pool fails if it loses this many actors per actor of it and finishes no unit in between.

An actor is ready before it loads a model, so a model that does not fit in memory kills each new one. The bound is above what
rows that kill their worker need: `ATTEMPTS_TOGETHER` of `answering.workers` and one per row of a unit (`answer.unit_queries`).
"""
MAX_WAIT_SECONDS = 1800
"""A stage fails if for this long no unit runs because no actor can start. A growing cluster may need minutes."""
AHEAD = 2
"""How many finished units may wait for the next pool, per actor of that pool."""


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


def run(pools: Sequence[Pool], units: Sequence[str]) -> Iterator[str]:
    """Run units (JSON) through the pools: each takes the results of the one before. Yields the last one's, in any order.

    Pools work at the same time. An actor that Ray cannot schedule yet delays no unit, as long as its pool has another one.

    Raises:
        RayError: a worker raised an exception, or actors cannot be started.
    """
    try:
        yield from _Stage(pools, units).results()
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

    def end(self) -> None:
        import ray

        _actors.remove(self)
        if ray.is_initialized():
            ray.kill(self.handle)


_actors: list[_Actor] = []
"""All actors of the session."""


@dataclass(slots=True)
class _Line:
    """A pool during a stage."""

    pool: Pool
    idle: list[_Actor] = field(default_factory=list)
    waiting: deque[str] = field(default_factory=deque)
    """Units for which no actor was free yet."""
    losses: int = 0
    """Actors that were lost since the last finished unit."""
    num_actors: int = 0
    """Actors that the stage reserved for it."""

    @property
    def is_full(self) -> bool:
        """Whether so many units wait that the pool before this one should pause."""
        return len(self.waiting) >= AHEAD * self.pool.num_actors


class _Stage:
    """The pools of a stage at work."""

    def __init__(self, pools: Sequence[Pool], units: Sequence[str]) -> None:
        self._lines = [_Line(pool) for pool in pools]
        self._lines[0].waiting.extend(units)
        self._unfinished, self._failed_starts = len(units), 0
        self._busy: dict[Any, tuple[int, _Actor, str | None]] = {}
        """Reference to a result -> place of the line, actor, and its unit (None: the actor is starting)."""
        for place, actors in enumerate(_reserve(pools, len(units))):
            self._lines[place].num_actors = len(actors)
            for actor in actors:
                self._expect(place, actor)

    def results(self) -> Iterator[str]:
        """The results of the last pool."""
        while self._unfinished:
            self._submit()
            result = self._next_result()
            if result is not None:
                self._unfinished -= 1
                yield result

    def _expect(self, place: int, actor: _Actor) -> None:
        """Let an actor of this line be idle as soon as it answers."""
        self._busy[actor.handle.ready.remote()] = (place, actor, None)

    def _submit(self) -> None:
        """Give waiting units to idle actors."""
        for place, line in enumerate(self._lines):
            while line.idle and line.waiting and not (place + 1 < len(self._lines) and self._lines[place + 1].is_full):
                actor, unit, pool = line.idle.pop(), line.waiting.popleft(), line.pool
                # Ray shows the name of a task in its dashboard and in the title of the process.
                task = actor.handle.run.options(name=pool.worker.__name__)
                self._busy[task.remote(pool.worker, pool.arguments, unit)] = (place, actor, unit)

    def _next_result(self) -> str | None:
        """Wait until an actor answers or is lost; returns the result if the last pool has finished a unit."""
        import ray
        import ray.exceptions

        ready, _ = ray.wait([*self._busy], num_returns=1, timeout=MAX_WAIT_SECONDS)
        if not ready:
            self._refuse_endless_wait()
            return None
        place, actor, unit = self._busy.pop(ready[0])
        try:
            result: str | None = ray.get(ready[0])
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.OutOfMemoryError) as error:
            self._replace(place, actor, unit, error)
            return None
        self._failed_starts, actor.is_ready = 0, True
        if unit is not None:
            self._lines[place].losses = 0
        self._lines[place].idle.append(actor)
        if place + 1 == len(self._lines):
            return result
        if result is not None:
            self._lines[place + 1].waiting.append(result)
        return None

    def _replace(self, place: int, lost: _Actor, unit: str | None, error: Exception) -> None:
        """Start an actor in the place of one that was lost, and let its unit wait for the next free one."""
        line = self._lines[place]
        line.losses += 1
        if line.losses >= MAX_LOSSES * line.num_actors:
            _refuse_endless_losses(line, error)
        self._failed_starts = 0 if lost.is_ready else self._failed_starts + 1
        if self._failed_starts == MAX_FAILED_STARTS:
            raise error
        if unit is not None:
            logger.warning("a worker process was lost and is replaced; its unit is repeated: %s", error)
            line.waiting.appendleft(unit)
        lost.end()
        self._expect(place, _start(lost.options))

    def _refuse_endless_wait(self) -> None:
        """Raise GetTimeoutError if every actor is still starting."""
        import ray.exceptions

        if all(unit is None for _, _, unit in self._busy.values()):
            wanted = " or ".join(str(line.pool.options) for line in self._lines)
            raise ray.exceptions.GetTimeoutError(
                f"no actor with the resources {wanted} could start within {MAX_WAIT_SECONDS} seconds; "
                "lower the settings of section cluster, or add nodes"
            )


def _refuse_endless_losses(line: _Line, error: Exception) -> None:
    """Raise RayError, since new actors of this pool only die as well."""
    import ray.exceptions

    raise ray.exceptions.RayError(
        f"{line.losses} worker processes ({line.pool.worker.__name__}) in a row were lost, with no finished unit between; "
        "often the model does not fit in memory: use a smaller one, lower the numbers of workers in section cluster, or add "
        f"memory. The last: {' '.join(str(error).split())}"
    )


def _reserve(pools: Sequence[Pool], num_units: int) -> list[list[_Actor]]:
    """The actors of each pool, at most one per unit: those that exist, then new ones.

    Other actors are ended if they reserve different resources, since the pools may need these; otherwise they only free
    their worker.
    """
    free, reserved = [*_actors], list[list[_Actor]]()
    counts = [min(pool.num_actors, num_units) for pool in pools]
    for pool, count in zip(pools, counts, strict=True):
        reserved.append([actor for actor in free if actor.options == pool.options][:count])
        free = [actor for actor in free if actor not in reserved[-1]]
    for actor in free:
        if any(actor.options.values()) and actor.options not in [pool.options for pool in pools]:
            actor.end()
        else:
            actor.handle.free.remote()
    for pool, count, actors in zip(pools, counts, reserved, strict=True):
        actors += [_start(pool.options) for _ in range(count - len(actors))]
    return reserved


def _start(options: dict[str, Any]) -> _Actor:
    import ray

    actor = _Actor(options, ray.remote(StageActor).options(scheduling_strategy="SPREAD", **options).remote())
    _actors.append(actor)
    return actor


class StageActor:
    """The actor: it runs units in the worker that it holds."""

    def __init__(self) -> None:
        self._worker: Any = None
        self._serves: tuple[type, dict[str, Any]] | None = None

    def ready(self) -> None:
        """Prepare the process, as soon as the actor runs."""
        devices.use_reserved_devices()

    def run(self, worker: type, arguments: dict[str, Any], unit: str) -> str:
        """Run a unit in a worker with these arguments: the current one, if it has them or can take them over."""
        if self._serves != (worker, arguments):
            is_alike = self._serves is not None and self._serves[0] is worker
            if not (is_alike and self._worker.continues_with(arguments)):
                self.free()
                self._worker = worker(**arguments)
            self._serves = (worker, arguments)
        result: str = self._worker.run(json.loads(unit))
        return result

    def free(self) -> None:
        """Drop the worker and return its memory."""
        self._worker = self._serves = None
        gc.collect()  # models and open indexes are in reference cycles
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        hardware.return_freed_memory()
