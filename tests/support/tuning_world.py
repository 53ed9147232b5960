"""A world for testing `tune` without Ray: fake verbs that keep the contracts of the real ones.

A model is a directory whose manifest states its skill: the share of questions that a generator answers correctly, or for
which a retriever ranks the right document first. Training raises the skill, or lowers it if the world is poisoned. Every
verb writes real artifacts at paths that depend on its settings and skips finished ones, like the real verbs. `calls.txt`
lists the work that was done.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ragtune_ray import config, schema
from ragtune_ray.cluster import session
from ragtune_ray.cluster.answering import answer as answer_module
from ragtune_ray.cluster.answering import retrieve as retrieve_module
from ragtune_ray.cluster.indexing import index
from ragtune_ray.cluster.training import prepare as prepare_module
from ragtune_ray.cluster.training import train as train_module
from ragtune_ray.cluster.tuning import tune as tune_module
from ragtune_ray.evaluation.questions.writing import prompts
from ragtune_ray.ingest import inputs, queries, splits
from ragtune_ray.models.arms import Pair
from ragtune_ray.storage import artifacts, checksums, filesystem

NUM_DOCUMENTS = 90
SPLITS = {"train": range(40), "validation": range(40, 75), "test": range(75, 85)}
START_SKILL = 0.3
GAIN = 0.3


def passage(number: int) -> schema.Passage:
    text = f"The code of vessel{number} is secret{number}. It lies in a harbor, where it waits for the next tide of the year."
    return schema.Passage(f"d{number}#0", f"d{number}", text, f"Vessel {number}", "{}", 0, len(text))


def write_questions(path: Path, *, without_answers: bool = False, with_qrels: bool = True) -> None:
    with path.open("w") as file:
        for split, numbers in SPLITS.items():
            for number in numbers:
                hidden = without_answers and split == "train" and number % 2
                row = {
                    "query_id": f"q{number}",
                    "text": f"What is the code of vessel{number}?",
                    "answers": None if hidden else [f"secret{number}"],
                    "document_ids": [f"d{number}"] if with_qrels else [],
                    "split": split,
                }
                file.write(json.dumps(row) + "\n")


def build(folder: Path, encoder: Path, generator: Path, write_index: Any) -> None:
    """Write the questions, an index and the initial models."""
    from ragtune_ray.models.encoder import HashingEncoder

    write_questions(folder / "questions.jsonl")
    write_questions(folder / "half.jsonl", without_answers=True)
    write_questions(folder / "unjudged.jsonl", with_qrels=False)
    write_index(
        folder / "workspace", [passage(number) for number in range(NUM_DOCUMENTS)], HashingEncoder("hashing-64")
    )
    (folder / "places.json").write_text(json.dumps([str(encoder), str(generator)]))


def settings_of(folder: Path, mode: str, *overrides: str) -> config.Config:
    encoder, generator = json.loads((folder / "places.json").read_text())
    asked = "half.jsonl" if mode == "iterative" else "questions.jsonl"
    return config.Config().using(
        f"workspace={folder / 'workspace'}",
        f"corpus.path={folder / 'questions.jsonl'}",
        f"queries.path={folder / asked}",
        f"encoder.model={encoder}",
        f"generator.model={generator}",
        "retrieval.top_k=3",
        "evaluate.resamples=200",
        f"tune.mode={mode}",
        "tune.min_examples=2",
        "tune.margin=0.2",
        "tune.passages=20",
        "tune.samples=1",
        "tune.min_precision=0",
        *overrides,
    )


class World:
    """The verbs of one folder."""

    def __init__(self, folder: Path, poisoned: str = "", *, forgets: bool = False) -> None:
        self.folder = folder
        self.poisoned = poisoned
        """A component that training makes worse."""
        self.forgets = forgets
        """Whether a trained retriever finds nothing for questions worded differently than in training."""

    def note(self, verb: str, url: str) -> None:
        with (self.folder / "calls.txt").open("a") as file:
            file.write(f"{verb} {Path(url).name}\n")

    def skill(self, model: str) -> float:
        return float(artifacts.read_manifest(model)["skill"]) if artifacts.is_finished(model) else START_SKILL

    def rows(self, settings: config.Config) -> list[schema.Query]:
        return [row for row in splits.selected_queries(settings.queries) if isinstance(row, schema.Query)]

    def ranking(self, settings: config.Config, text: str) -> list[str]:
        """Ranked passages for a question: the right one first or twelfth, depending on the retriever's skill."""
        right = int(text.rstrip("?").rpartition("vessel")[2] or 0)
        others = [number for number in range(NUM_DOCUMENTS) if number != right]
        model = settings.encoder.query_model or settings.encoder.model
        skilled = splits.draw(text, 1) < self.skill(model)
        if self.forgets and artifacts.is_finished(model) and not text.startswith("What is the code of"):
            skilled = False
        others.insert(0 if skilled else 11, right)
        return [f"d{number}#0" for number in others]

    def answer(self, settings: config.Config) -> str:
        rows = self.rows(settings)
        parts = [
            settings.model_dump(mode="json", include={"answer", "generator", "encoder", "prompt", "seed"}),
            [[row.query_id, row.text] for row in rows],
        ]
        url = filesystem.join(settings.workspace, "runs", f"answer-{checksums.digest(parts)}")
        if not artifacts.is_finished(url):
            self.note("answer", url)
            staging = artifacts.stage(url)
            made = [self.answer_of(settings, row) for row in rows]
            pq.write_table(schema.to_table(made, schema.Answer), staging / "answers.parquet")
            artifacts.publish(staging, url, "answer")
        return url

    def answer_of(self, settings: config.Config, query: schema.Query) -> schema.Answer:
        if settings.answer.gold_passage:
            shown = [f"{query.document_ids[0]}#0"]
        else:
            shown = self.ranking(settings, query.text)[: settings.retrieval.top_k]
        if query.text == prompts.ASK:
            text, cited = f"What is the code of vessel{query.document_ids[0][1:]}?", ""
        else:
            number = query.text.rstrip("?").rpartition("vessel")[2]
            knows = splits.draw(query.text, 2) < self.skill(settings.generator.model)
            cited = f"d{number}#0" if knows and f"d{number}#0" in shown else ""
            text = f"secret{number}" if cited else "nothing of the kind"
        citations = (schema.Citation(cited, cited.partition("#")[0], 0, 20),) if cited else ()
        return schema.Answer(
            query.query_id, query.text, text, citations, tuple(shown), (1.0,) * len(shown), False, 0.1, 9, 3, "ok", "", "1",
            settings.generator.model, self.confidence(query.query_id, bool(cited)),
        )  # fmt: skip

    def confidence(self, name: str, knows: bool) -> float:
        """The confidence of an answer, higher for correct ones."""
        return (0.5 if knows else 0.1) + 0.4 * splits.draw(name, 3)

    def retrieve(self, settings: config.Config) -> str:
        rows = self.rows(settings)
        depth = settings.evaluate.depth
        parts = [settings.encoder.model_dump(mode="json"), depth, [row.text for row in rows], settings.workspace]
        url = filesystem.join(settings.workspace, "runs", f"retrieve-{checksums.digest(parts)}")
        if not artifacts.is_finished(url):
            self.note("retrieve", url)
            staging = artifacts.stage(url)
            hits = [
                schema.Hit(row.query_id, name, name.partition("#")[0], rank, 1 / rank)
                for row in rows
                for rank, name in enumerate(self.ranking(settings, row.text)[:depth], start=1)
            ]
            pq.write_table(schema.to_table(hits, schema.Hit), staging / "hits.parquet")
            artifacts.publish(staging, url, "retrieve")
        return url

    def prepare(self, settings: config.Config) -> str:
        learnt = self.rows(settings.using("queries.split=train"))
        if not learnt:
            raise inputs.InputError("no train query of 0 yields an example")
        parts = [settings.training.model_dump(mode="json"), [[row.query_id, row.answers] for row in learnt]]
        parts += [Pair.of(settings).facts()]
        url = filesystem.join(settings.workspace, "runs", f"examples-{checksums.digest(parts)}")
        if not artifacts.is_finished(url):
            self.note("prepare", url)
            facts: dict[str, Any] = {"num_train": len(learnt), "num_rejects": 0, "kinds": {}}
            if settings.training.learns_from_generator:
                facts["teacher"] = {"MRR": 0.9, "retriever_MRR": 0.5, "entropy": 0.4, "n": len(learnt)}
            artifacts.publish(artifacts.stage(url), url, "examples", **facts)
        return url

    def train(self, settings: config.Config) -> train_module.TrainResult:
        examples = self.prepare(settings)
        name = settings.training.name
        url = filesystem.join(settings.workspace, "models", name, checksums.digest(Path(examples).name))
        if not artifacts.is_finished(url):
            self.note("train", url)
            learns_reading = settings.training.objective == "sft"
            start = settings.generator.model if learns_reading else settings.encoder.model
            sign = -1 if self.poisoned == ("generator" if learns_reading else "retriever") else 1
            facts = {
                "input": {"num_train": artifacts.read_manifest(examples)["num_train"]},
                "best": {"step": 5},
                "skill": max(0.0, self.skill(start) + sign * GAIN),
                "start": start,
                "seconds": {"steps": 1.0},
            }
            artifacts.publish(artifacts.stage(url), url, "model", **facts)
        artifacts.make_current(filesystem.join(settings.workspace, "models", name), Path(url).name)
        return train_module.TrainResult(url)

    def build_index(self, settings: config.Config) -> str:
        url = filesystem.join(settings.workspace, "index", "versions", "000001")
        if not filesystem.exists(filesystem.join(settings.workspace, "index", "CURRENT")):
            self.note("index", url)
            source = filesystem.join(str(self.folder / "workspace"), "index")
            filesystem.copy_tree(source, filesystem.join(settings.workspace, "index"))
        return url

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Replace the real verbs by those of this world."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(answer_module, "answer", self.answer)
            patch.setattr(retrieve_module, "retrieve", self.retrieve)
            patch.setattr(prepare_module, "prepare", self.prepare)
            patch.setattr(train_module, "train", self.train)
            patch.setattr(index, "build_index", self.build_index)
            patch.setattr(session, "ray_session", lambda *_, **__: contextlib.nullcontext())
            patch.setattr(session, "workers", lambda *_: 2)
            yield

    def tune(self, mode: str, *overrides: str) -> str:
        with self.at_work():
            return tune_module.tune(settings_of(self.folder, mode, *overrides)).path

    def calls(self) -> list[str]:
        path = self.folder / "calls.txt"
        return path.read_text().splitlines() if path.exists() else []


def read_made(url: str) -> list[schema.Query]:
    return [row for row in queries.read_queries(url) if isinstance(row, schema.Query)]


def index_bytes(workspace: Path) -> dict[str, bytes]:
    """Every file of an index."""
    return {path.as_posix(): path.read_bytes() for path in sorted((workspace / "index").rglob("*")) if path.is_file()}
