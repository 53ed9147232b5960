"""The worker that grades one unit of tasks at a time."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ragtune_ray import config
from ragtune_ray.cluster import session, stages
from ragtune_ray.evaluation.grading import graders
from ragtune_ray.evaluation.grading.task import Task


class GradeUnit(stages.UnitWorker):
    """A grader with its models."""

    def __init__(self, settings: config.Config, metric: config.GradedMetric) -> None:
        session.use_one_thread()
        self._identity = graders.identity(settings, metric)
        self._grader = graders.open_grader(settings, metric)

    def continues_with(self, arguments: dict[str, Any]) -> bool:
        """Take over other arguments, if they lead to the same grades."""
        return bool(graders.identity(arguments["settings"], arguments["metric"]) == self._identity)

    def run(self, unit: dict[str, Any]) -> str:
        """Grade the tasks of a unit; returns the grade of each key as JSON."""
        tasks = [
            Task(
                task["query"],
                tuple(task["golds"]),
                task["answer"],
                tuple(task["passages"]),
                tuple(task["sentences"]),
                tuple(map(tuple, task["cited"])),
            )
            for task in unit["tasks"]
        ]
        found = self._grader.grade(tasks)
        return json.dumps({task.key(): dataclasses.asdict(grade) for task, grade in zip(tasks, found, strict=True)})
