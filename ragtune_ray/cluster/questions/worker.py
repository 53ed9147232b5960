"""The worker of `ragtune questions`: writes and checks the questions of one unit of drawn passages."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from ragtune_ray import config
from ragtune_ray.cluster import session, stages
from ragtune_ray.evaluation.questions.writing import rows
from ragtune_ray.evaluation.questions.writing.drawing import Seed
from ragtune_ray.evaluation.questions.writing.making import Maker


class QuestionUnit(stages.UnitWorker):
    """A generator and a retriever.

    Args:
        settings: with the generator that writes the questions.
        version: of the index.
        directory: of the stage.
    """

    def __init__(self, settings: config.Config, version: str, directory: str) -> None:
        from ragtune_ray.generation.generator import open_generator
        from ragtune_ray.index.retriever import open_retriever

        session.use_one_thread()
        generator, _ = open_generator(settings)
        self._retriever = open_retriever(settings, version)
        self._maker = Maker(settings, generator, self._retriever)
        self._directory = directory

    def run(self, unit: dict[str, Any]) -> str:
        """Write and check a question for each seed of a unit."""
        started = time.time()
        seeds = [Seed(each["kind"], tuple(each["passage_ids"]), each["turn"]) for each in unit["seeds"]]
        passages = self._retriever.index.by_id(name for seed in seeds for name in seed.passage_ids)
        made = self._maker.make(seeds, passages)
        with tempfile.TemporaryDirectory(prefix="ragtune-questions-") as temporary:
            path = Path(temporary) / "outcomes.jsonl"
            path.write_text("".join(f"{rows.dumped(outcome)}\n" for outcome in made), encoding="utf-8")
            return stages.commit_unit(
                self._directory, unit["unit"], {"jsonl": path}, started=started, ended=time.time()
            )


def unit_of(number: int, seeds: list[Seed]) -> dict[str, Any]:
    """A unit of work as JSON values."""
    return {"unit": number, "seeds": [dataclasses.asdict(seed) for seed in seeds]}
