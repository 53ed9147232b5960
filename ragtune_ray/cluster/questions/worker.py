"""The worker of `ragtune questions`: writes and checks the questions of one unit of drawn passages."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragtune_ray import config
from ragtune_ray.cluster import session, stages
from ragtune_ray.evaluation.questions.writing import rows
from ragtune_ray.evaluation.questions.writing.drawing import Seed
from ragtune_ray.evaluation.questions.writing.making import Maker
from ragtune_ray.index import contents


class QuestionUnit(stages.UnitWorker):
    """A generator and a retriever.

    Args:
        settings: with the generator that writes the questions.
        version: of the index.
        directory: of the stage.
        shards: actors that search the index, if no process may open the whole of it.
    """

    def __init__(self, settings: config.Config, version: str, directory: str, shards: Sequence[Any]) -> None:
        from ragtune_ray.cluster.serving.shard_actors import DividedRetriever
        from ragtune_ray.generation.generator import open_generator
        from ragtune_ray.index.retriever import open_retriever

        session.use_one_thread()
        generator, _ = open_generator(settings)
        searcher = DividedRetriever(settings, version, shards) if shards else open_retriever(settings, version)
        self._maker = Maker(settings, generator, searcher)
        self._workspace, self._version, self._directory = settings.workspace, version, directory

    def run(self, unit: dict[str, Any]) -> str:
        """Write and check a question for each seed of a unit."""
        started = time.time()
        seeds = [Seed(each["kind"], tuple(each["passage_ids"]), each["turn"]) for each in unit["seeds"]]
        names = (name for seed in seeds for name in seed.passage_ids)
        passages = contents.passages_by_id(self._workspace, names, self._version)
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
