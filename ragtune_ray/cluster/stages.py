"""A stage: units of work on Ray Data, each committed once, so that a killed run costs only its unfinished units.

In: numbered units and a Ray Data transformation that works on them. Out: one summary per unit, in order. A unit's work ends
by writing its marker, a small JSON file with its summary, after its files; a unit with a marker is skipped by the next
run. Units must be deterministic, so that doing one twice does no harm. This module knows nothing of what the units hold.

Ray Data's own job checkpoints are not used here: they need one output row per input row, present from read to write, while a
unit of a corpus becomes any number of passages.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ragtune_ray import RagtuneError, progress
from ragtune_ray.storage import filesystem

if TYPE_CHECKING:
    import ray.data

__all__ = [
    "StageError",
    "Worker",
    "begin_attempt",
    "commit_unit",
    "finished_units",
    "forget_unit",
    "run_stage",
    "unit_file",
]

logger = logging.getLogger(__name__)

_CAUSED = "\nThe above exception was the direct cause of the following exception:"
_WORDS = re.compile(r"^(?P<module>(?:\w+\.)*)(?P<words>\w+: .+)$", re.MULTILINE)
"""The last line of a traceback."""

Summary = dict[str, Any]
Worker = Callable[[dict[str, np.ndarray]], dict[str, list[str]]]
"""Takes units as JSON under "unit" and gives `commit_unit`'s results under "summary"."""


class StageError(RagtuneError, RuntimeError):
    """A stage of a job failed; the message names the stage and the root cause."""


def unit_file(directory: str, number: int, suffix: str) -> str:
    """Where a file of a unit stands.

    >>> unit_file("work/embed", 7, "npy")
    'work/embed/unit-00000007.npy'
    """
    return filesystem.join(directory, f"unit-{number:08d}.{suffix}")


def commit_unit(directory: str, number: int, files: dict[str, Path], **summary: Any) -> str:
    """Move a unit's files to their places and mark it as finished.

    Args:
        directory: of the stage.
        number: of the unit.
        files: suffix -> finished local file, which is moved.
        **summary: JSON values that the driver needs.

    Returns:
        The summary as JSON, to be yielded to the driver.
    """
    for suffix, local in files.items():
        filesystem.commit_file(local, unit_file(directory, number, suffix))
    names = [unit_file("", number, suffix).lstrip("/") for suffix in files]
    text = json.dumps({"unit": number, "files": names, **summary}, sort_keys=True)
    filesystem.replace_text(unit_file(directory, number, "json"), text)
    return text


def begin_attempt(directory: str, number: int) -> int:
    """Note that a unit is being tried; how many times it now has been, this one included, over all workers and runs."""
    attempt = 1
    while filesystem.exists(unit_file(directory, number, f"attempt-{attempt}.txt")):
        attempt += 1
    filesystem.replace_text(unit_file(directory, number, f"attempt-{attempt}.txt"), "")
    return attempt


def forget_unit(directory: str, number: int) -> None:
    """Remove everything a unit left, its attempts included: the next run does it as if for the first time."""
    prefix = unit_file("", number, "").lstrip("/")
    for name in filesystem.list_names(directory):
        if name.startswith(prefix):
            filesystem.remove(filesystem.join(directory, name))


def finished_units(directory: str) -> dict[int, Summary]:
    """The summaries of the units that earlier runs finished, by unit number.

    A unit whose marker is damaged, or whose files have vanished, counts as unfinished and is done again.
    """
    finished = {}
    names = set(filesystem.list_names(directory))
    for name in sorted(names):
        if not name.endswith(".json"):
            continue
        try:
            summary = json.loads(filesystem.read_text(filesystem.join(directory, name)))
            number, files = int(summary["unit"]), set(summary["files"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s/%s is damaged; its unit is done again", directory, name)
            continue
        if files <= names:
            finished[number] = summary
    return finished


def run_stage(
    name: str,
    directory: str,
    units: Sequence[dict[str, Any]],
    transform: Callable[[ray.data.Dataset], ray.data.Dataset],
    *,
    counted: str = "units",
    rows_of: Callable[[dict[str, Any]], int] | None = None,
    in_process: Callable[[], Worker] | None = None,
) -> list[Summary]:
    """Do every unit that has no marker yet.

    Args:
        name: for people, such as "embed".
        directory: where markers and files of the units stand; local or remote.
        units: rows for the dataset, each with its number under "unit".
        transform: from a dataset with one block per unit (JSON under "unit") to `commit_unit`'s results under "summary".
        counted: what progress counts, such as "passages".
        rows_of: how many of them a unit holds; None counts units.
        in_process: makes the worker that does the units one by one in this process, without Ray; None: `transform` on Ray.

    Returns:
        The summaries of all units, in the order of `units`.

    Raises:
        StageError: a unit failed for good, or was not committed.
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
            results = _one_by_one(in_process(), pending) if in_process else _on_ray(name, transform, pending)
            for result in results:
                summary = json.loads(result)
                finished[summary["unit"]] = summary
                shown.advance(rows_of(by_number[summary["unit"]]))
    missing = [number for number in by_number if number not in finished]
    if missing:
        raise StageError(
            f"{name}: {len(missing)} units were not committed (first: {missing[0]}); run the command again"
        )
    return [finished[number] for number in by_number]


def _one_by_one(worker: Worker, pending: Sequence[dict[str, Any]]) -> Iterator[str]:
    for unit in pending:
        yield from worker({"unit": np.array([json.dumps(unit)])})["summary"]


def _on_ray(
    name: str, transform: Callable[[ray.data.Dataset], ray.data.Dataset], pending: Sequence[dict[str, Any]]
) -> Iterator[str]:
    import ray.data
    import ray.exceptions

    dataset = ray.data.from_items([{"unit": json.dumps(unit)} for unit in pending], override_num_blocks=len(pending))
    try:
        for row in transform(dataset).iter_rows():
            yield row["summary"]
    except (ray.exceptions.RayError, ray.exceptions.UserCodeException) as error:
        raise StageError(f"{name}: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    """The words of the exception that the unit's work raised, without Ray's wrapping."""
    import ray.exceptions

    while True:
        # Ray Data's own exception, crossing processes, has lost what caused it: only the text of its traceback still tells.
        parts = str(error).split(_CAUSED) if isinstance(error, ray.exceptions.RayTaskError) else []
        raised = [
            each for part in parts for each in list(_WORDS.finditer(part))[-1:] if each["module"] != "ray.exceptions."
        ]
        if raised:
            return raised[-1]["words"]
        cause = getattr(error, "cause", None) or error.__cause__
        if not isinstance(cause, BaseException):
            return str(error) or type(error).__name__
        error = cause
