"""Finished runs of `answer` with given rows, for tests that score or grade them, and grading without Ray."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ragtune_ray import schema
from ragtune_ray.cluster import stages
from ragtune_ray.cluster.grading import grade
from ragtune_ray.storage import artifacts


def publish_answers(workspace: str, arm: str, rows: Sequence[schema.Answer], index_version: str = "") -> str:
    """A run of `answer` with these rows."""
    url = str(Path(workspace) / "runs" / f"answer-{arm}")
    staging = artifacts.stage(url)
    pq.write_table(schema.to_table(rows, schema.Answer), staging / "answers.parquet", write_page_checksum=True)
    artifacts.publish(staging, url, "answer", index_version=index_version, index_content="", statuses={})
    return url


def grade_in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let grading run here, without Ray; returns the numbers of tasks of the units so far, as they are graded."""
    sizes: list[int] = []

    def on_actors(pool: grade.actors.Pool) -> stages.Work:
        def work(name: str, units: Sequence[dict]) -> object:
            sizes.extend(len(unit["tasks"]) for unit in units)
            return stages.in_process(lambda: pool.worker(**pool.arguments))(name, units)

        return work

    monkeypatch.setattr(grade.stages, "on_actors", on_actors)
    monkeypatch.setattr(grade.session, "ray_session", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(grade.session, "workers", lambda *_: 1)
    return sizes
