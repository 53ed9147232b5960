"""Runs numbered units of work on Ray and commits each once, so that a killed run loses only its unfinished units.

A worker finishes a unit by writing its files and then its marker, a JSON file with a summary. The next run skips units that
have a marker. Units must be deterministic, because a unit may run twice. Ray Data's own checkpoints need one output row per
input row, but a unit of a corpus becomes any number of passages.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ragtune_ray import RagtuneError, progress
from ragtune_ray.cluster import actors
from ragtune_ray.storage import filesystem

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

_CAUSED_BY = "\nThe above exception was the direct cause of the following exception:"
_LAST_LINE = re.compile(r"^(?P<module>(?:\w+\.)*)(?P<message>\w+: .+)$", re.MULTILINE)
"""The last line of a traceback."""

Summary = dict[str, Any]
Worker = Callable[[dict[str, np.ndarray]], dict[str, list[str]]]
"""Takes units as JSON in column "unit" and returns the results of `commit_unit` in column "summary"."""
Work = Callable[[str, Sequence[dict[str, Any]]], Iterator[str]]
"""Runs the given units of the stage of this name; yields the results of `commit_unit`, in any order."""


class StageError(RagtuneError, RuntimeError):
    """A stage of a job failed; the message names the stage and the root cause."""


class UnitWorker:
    """Does the units of a stage, one at a time, with what its constructor loads."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Do the units of the batch, as an actor of Ray Data."""
        return {"summary": [self.run(json.loads(unit)) for unit in batch["unit"]]}

    def continues_with(self, arguments: dict[str, Any]) -> bool:  # noqa: ARG002 - for subclasses
        """Take over the constructor's arguments of a later stage, if nothing new must be loaded; otherwise return False."""
        return False

    def run(self, unit: dict[str, Any]) -> str:
        """Do a unit; returns the result of `commit_unit`."""
        raise NotImplementedError


def unit_file(directory: str, number: int, suffix: str) -> str:
    """The path of a file of a unit.

    >>> unit_file("work/embed", 7, "npy")
    'work/embed/unit-00000007.npy'
    """
    return filesystem.join(directory, f"unit-{number:08d}.{suffix}")


def commit_unit(directory: str, number: int, files: dict[str, Path], **summary: Any) -> str:
    """Move a unit's files (suffix -> local file) into the stage's directory and mark the unit as finished.

    Returns the summary (JSON values that the driver needs) as JSON, which the worker passes on to the driver.
    """
    for suffix, local in files.items():
        filesystem.commit_file(local, unit_file(directory, number, suffix))
    names = [unit_file("", number, suffix).lstrip("/") for suffix in files]
    text = json.dumps({"unit": number, "files": names, **summary}, sort_keys=True)
    filesystem.replace_text(unit_file(directory, number, "json"), text)
    return text


def begin_attempt(directory: str, number: int) -> int:
    """Record an attempt at a unit; returns the number of attempts so far, by all workers and runs."""
    attempt = 1
    while filesystem.exists(unit_file(directory, number, f"attempt-{attempt}.txt")):
        attempt += 1
    filesystem.replace_text(unit_file(directory, number, f"attempt-{attempt}.txt"), "")
    return attempt


def forget_unit(directory: str, number: int) -> None:
    """Remove all files of a unit, including the records of attempts, so that the next run starts it from scratch."""
    prefix = unit_file("", number, "").lstrip("/")
    for name in filesystem.list_names(directory):
        if name.startswith(prefix):
            filesystem.remove(filesystem.join(directory, name))


def finished_units(directory: str) -> dict[int, Summary]:
    """Unit number -> summary of each finished unit; a unit with a damaged marker or missing files counts as unfinished."""
    finished = {}
    names = set(filesystem.list_names(directory))
    for name in sorted(names):
        if not name.endswith(".json"):
            continue
        try:
            summary = json.loads(filesystem.read_text(filesystem.join(directory, name)))
            number, files = int(summary["unit"]), set(summary["files"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s/%s is damaged; its unit is repeated", directory, name)
            continue
        if files <= names:
            finished[number] = summary
    return finished


def run_stage(
    name: str,
    directory: str,
    units: Sequence[dict[str, Any]],
    work: Work,
    *,
    counted: str = "units",
    rows_of: Callable[[dict[str, Any]], int] | None = None,
) -> list[Summary]:
    """Run every unit that has no marker yet, and return the summaries of all units, in order.

    Args:
        name: for progress lines, such as "embed".
        directory: of markers and files; local or remote.
        units: each with its number under "unit".
        work: runs the units: `on_actors`, `on_ray_data` or `in_process`.
        counted: what progress lines count, such as "passages".
        rows_of: returns how many of these a unit contains; None counts units.

    Raises:
        StageError: a unit failed permanently, or was not committed.
    """
    rows_of = rows_of or (lambda _: 1)
    finished = finished_units(directory)
    by_number = {unit["unit"]: unit for unit in units}
    finished = {number: summary for number, summary in finished.items() if number in by_number}
    pending = [unit for unit in units if unit["unit"] not in finished]
    total = sum(rows_of(unit) for unit in units)
    skipped = sum(rows_of(by_number[number]) for number in finished)
    with progress.stage(name, total, counted, skipped) as shown:
        if pending:
            for result in work(name, pending):
                summary = json.loads(result)
                finished[summary["unit"]] = summary
                shown.advance(rows_of(by_number[summary["unit"]]))
    missing = [number for number in by_number if number not in finished]
    if missing:
        raise StageError(
            f"{name}: {len(missing)} units were not committed (first: {missing[0]}); run the command again"
        )
    return [finished[number] for number in by_number]


def on_actors(pool: actors.Pool) -> Work:
    """Run units in a pool of actors that stay for the next stage."""

    def work(name: str, pending: Sequence[dict[str, Any]]) -> Iterator[str]:
        with root_cause_raised(name):
            yield from actors.run(pool, [json.dumps(unit) for unit in pending])

    return work


def on_ray_data(transform: Callable[[ray.data.Dataset], ray.data.Dataset]) -> Work:
    """Run units with Ray Data.

    `transform` turns a dataset with one block per unit (JSON in column "unit") into `commit_unit`'s results in column "summary".
    """

    def work(name: str, pending: Sequence[dict[str, Any]]) -> Iterator[str]:
        import ray.data

        actors.release()
        units = [{"unit": json.dumps(unit)} for unit in pending]
        with root_cause_raised(name):
            for row in transform(ray.data.from_items(units, override_num_blocks=len(units))).iter_rows():
                yield row["summary"]

    return work


def in_process(make_worker: Callable[[], Worker]) -> Work:
    """Run units one by one in this process, without Ray."""

    def work(_: str, pending: Sequence[dict[str, Any]]) -> Iterator[str]:
        worker = make_worker()
        for unit in pending:
            yield from worker({"unit": np.array([json.dumps(unit)])})["summary"]

    return work


def remote(function: Callable[..., Any], *, memory_bytes: int = 0, max_retries: int = 3) -> Any:
    """A function as a Ray task with a core and `available_bytes` of this much memory. Actors that hold cores are ended."""
    import ray

    actors.release()
    options = {"num_cpus": 1, "max_retries": max_retries, "memory": available_bytes(memory_bytes), **actors.elsewhere()}
    return ray.remote(**options)(function)


def available_bytes(wanted_bytes: int) -> int:
    """So much memory, or half of what the largest node has, if that is less: a task that reserves more would never start."""
    import ray

    largest = max((int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    return min(wanted_bytes, largest // 2)


@contextlib.contextmanager
def root_cause_raised(name: str) -> Iterator[None]:
    """Turn an error of Ray into a StageError with the exception that the worker raised."""
    import ray.exceptions

    try:
        yield
    except (ray.exceptions.RayError, ray.exceptions.UserCodeException) as error:
        raise StageError(f"{name}: {_root_cause(error)}") from error


def last_error(text: str) -> str:
    r"""The message of the exception in a text that contains the traceback of a worker; without one, the text on one line.

    >>> last_error("Failed to start replica: Traceback (most recent call last):\n  File ...\nValueError: too small")
    'ValueError: too small'
    """
    return _raised(text) or " ".join(text.split())


def _raised(text: str) -> str:
    """The message of the exception that a worker raised, from a traceback that Ray passed on; "" if there is none."""
    raised = [
        each["message"]
        for part in text.split(_CAUSED_BY)
        for each in list(_LAST_LINE.finditer(part))[-1:]
        if each["module"] != "ray.exceptions."
    ]
    return raised[-1] if raised else ""


def _root_cause(error: BaseException) -> str:
    """The message of the exception that the worker raised, without Ray's wrapping."""
    import ray.exceptions

    while True:
        # An exception loses its cause when it crosses processes; only the text of its traceback still names it.
        has_traceback = isinstance(error, ray.exceptions.RayTaskError | ray.exceptions.RayActorError)
        if has_traceback and (raised := _raised(str(error))):
            return raised
        cause = getattr(error, "cause", None) or error.__cause__
        if not isinstance(cause, BaseException):
            return str(error) or type(error).__name__
        error = cause
