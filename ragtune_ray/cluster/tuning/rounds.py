"""The rounds of `tune`: train a component on chosen questions, judge it, and accept or refuse it.

Every step runs a verb on a file of questions stored next to the ledger, so a person could run it by hand. Nothing is overwritten:
a tuned model has its own name, and the index of a tuned encoder its own workspace.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster import runs, staged_queries
from ragtune_ray.cluster.indexing import index
from ragtune_ray.cluster.training import prepare, train
from ragtune_ray.cluster.tuning import forecast, judging
from ragtune_ray.index import versions
from ragtune_ray.ingest import inputs, splits
from ragtune_ray.models.arms import Pair
from ragtune_ray.storage import artifacts, filesystem
from ragtune_ray.tuning import gates
from ragtune_ray.tuning.ledger import Ledger, Row


class TuneError(RagtuneError, ValueError):
    """Tuning is impossible with this config."""


class Rounds:
    """The state and the steps of a running tune.

    Args:
        settings: config of the tune.
        root: directory of its ledger, questions and indexes.
        ledger: its steps so far.
        pair: the retriever and generator before tuning.
        stages: announces what the rounds do.
    """

    def __init__(self, settings: config.Config, root: str, ledger: Ledger, pair: Pair, stages: progress.Stages) -> None:
        self.settings, self.root, self.ledger, self.stages = settings, root, ledger, stages
        self.pair = pair
        """The current retriever and generator: the last accepted ones."""
        self.number = 1
        """The number of the current round."""
        self.forbidden = {
            document_id
            for split in ("validation", "test")
            for query in judging.queries_of(settings, split)
            for document_id in splits.positives(query)
        }
        """Documents of validation and test questions, which must not be used for training."""

    def step(self, name: str, work: Callable[[], Mapping[str, Any]], components: Sequence[str] = ()) -> Row:
        """Run a step of this round once, for these components; see `Ledger.step`."""
        about = {"components": list(components)} if components else {}
        return self.ledger.step(self.number, name, lambda: {**about, **work()})

    def path_step(self, name: str, work: Callable[[], object]) -> str:
        """Run a step that records and returns the path that `work` returns."""
        path: str = self.step(name, lambda: {"path": str(work())})["path"]
        return path

    def settings_with(self, pair: Pair, values: Mapping[str, Any]) -> config.Config:
        """The config with a pair's models and these values."""
        return pair.used_in(self.settings).with_values(values)

    def settings_for(self, path: str, values: Mapping[str, Any] | None = None) -> config.Config:
        """The config for the questions of a file from `write_questions`, with the current pair in the arm rag."""
        return self.settings_with(
            self.pair,
            {
                "queries.path": path,
                "queries.split_by": "given",
                "queries.limit": 0,
                "queries.unindexed": "keep",
                **staged_queries.own_documents_setting(self.settings),
                "queries.split": "train",
                "answer.arm": "rag",
                "answer.max_failed_share": 1,
                **(values or {}),
            },
        )

    def write_questions(self, name: str, questions: Sequence[schema.Query]) -> str:
        """Write training questions and the validation questions to a file; returns its path."""
        rows = [dataclasses.replace(query, split="train") for query in questions]
        rows += judging.queries_of(self.settings, "validation")
        lines = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows)
        url = filesystem.join(self.root, f"{self.number:02d}-{name}.jsonl")
        filesystem.replace_text(url, "".join(lines))
        return url

    def tune_generator(self, path: str, num_questions: int, start: str = "") -> bool:
        """Train the generator on the questions of a file, with the current retriever's passages; returns whether it is accepted.

        Args:
            path: file from `write_questions`.
            num_questions: number of training questions in it.
            start: model to start from; empty: the current generator.
        """
        if not self._is_due("generator", num_questions):
            return False
        settings = self.settings_for(
            path,
            {
                "training.objective": "sft",
                "training.teacher": "retrieval",
                "training.arm": "rag+ft",
                "training.name": f"{self.settings.tune.mode}-generator",
                "generator.model": start or self.pair.generator_model,
            },
        )
        trained = self._train(["generator"], settings)
        if trained is None:
            return False
        changed = dataclasses.replace(self.pair, generator_model=trained["model"])
        return self._judge("generator", changed, trained["num_examples"])

    def tune_retriever(self, path: str, num_questions: int, *, taught: bool) -> bool:
        """Train the retriever on the questions of a file, reindex the corpus if configured; returns whether it is accepted.

        Args:
            path: file from `write_questions`.
            num_questions: number of training questions in it.
            taught: learn from the generator; otherwise from the questions' positives or a reranker's scores.
        """
        if not self._is_due("retriever", num_questions):
            return False
        rule = self.settings.tune
        objective = "query_side"
        if rule.reindex:
            objective = "distillation" if taught or self.settings.retrieval.reranker else "contrastive"
        settings = self.settings_for(
            path,
            {
                "training.objective": objective,
                "training.name": f"{rule.mode}-retriever",
                "training.teacher": "generator" if taught else "retrieval",
                "training.lora_rank": 0,
                "training.learning_rate": rule.retriever_learning_rate,
                **({"training.hard_negatives": rule.candidates - 1} if taught else {}),
            },
        )
        trained = self._train(["retriever"], settings)
        if trained is None:
            return False
        changed = dataclasses.replace(self.pair, query_model=trained["model"])
        if rule.reindex:
            workspace = filesystem.join(self.root, f"{self.number:02d}")
            changed = Pair(workspace, trained["model"], "", self.pair.generator_model)
            self.step("corpus indexed", lambda: self._index(changed), ["retriever"])
        return self._judge("retriever", changed, trained["num_examples"])

    def tune_both(self, path: str, num_questions: int) -> bool:
        """Train generator and retriever together, then judge one after the other; returns whether one is accepted."""
        both: tuple[config.Component, ...] = ("retriever", "generator")
        due = [self._is_due(component, num_questions) for component in both]  # a list, so that each records its verdict
        if not all(due):
            return False
        settings = self.settings_for(
            path,
            {
                "training.objective": "joint",
                "training.name": f"{self.settings.tune.mode}-both",
                "training.teacher": "retrieval",
                "training.hard_negatives": self.settings.tune.candidates - 1,
                "generator.model": self.pair.generator_model,
            },
        )
        trained = self._train(both, settings)
        if trained is None:
            return False
        changed = dataclasses.replace(self.pair, query_model=trained["query_model"])
        accepts_retriever = self._judge("retriever", changed, trained["num_examples"])
        # The generator is judged with the current retriever, which is the new one if that was accepted.
        changed = dataclasses.replace(self.pair, generator_model=trained["model"])
        return self._judge("generator", changed, trained["num_examples"]) or accepts_retriever

    def _is_due(self, component: config.Component, num_questions: int) -> bool:
        rule = self.settings.tune
        if component not in rule.components:
            return False
        if num_questions >= rule.min_examples:
            return True
        reason = f"{num_questions} training questions, fewer than tune.min_examples ({rule.min_examples})"
        return self._refuse(component, reason)

    def _train(self, components: Sequence[config.Component], settings: config.Config) -> Row | None:
        """Train a model for these components; None if there is too little to learn, or nothing better was found."""
        rule, name = self.settings.tune, " and ".join(components)
        self.stages.begin(forecast.train_stage(self.number, name))
        prepared = self.step(f"{name} prepared", lambda: _prepare_examples(settings), components)
        problem = prepared["problem"]
        if not problem and prepared["num_examples"] < rule.min_examples:
            problem = f"{prepared['num_examples']} examples, fewer than tune.min_examples ({rule.min_examples})"
        if not problem and prepared["teacher"]:
            problem = gates.teacher_problem(prepared["teacher"])
        trained = None if problem else self.step(f"{name} trained", lambda: _train_model(settings), components)
        if trained and not trained["best_step"]:
            problem = "training found nothing better than the start"
        if not problem:
            return trained
        for component in components:
            self._refuse(component, problem, (trained or prepared)["num_examples"])
        return None

    def _refuse(self, component: config.Component, reason: str, num_examples: int = 0) -> bool:
        verdict = gates.refused(component, reason, num_examples)
        self._say(self.step(f"{component} judged", verdict.facts))
        return False

    def _judge(self, component: config.Component, changed: Pair, num_examples: int) -> bool:
        """Judge a changed pair and make it the current pair if it is accepted."""

        def verdict() -> dict[str, Any]:
            judge = judging.judge_generator if component == "generator" else judging.judge_retriever
            return {**judge(self.settings, self.pair, changed, num_examples).facts(), "pair": changed.facts()}

        self.stages.begin(forecast.judge_stage(self.number, component))
        row = self.step(f"{component} judged", verdict)
        self._say(row)
        if row["accepted"]:
            self.pair = changed
        return bool(row["accepted"])

    def _say(self, row: Row) -> None:
        verdict = "accepted" if row["accepted"] else "refused"
        scored = f": {row['metric']} {row['before']:.3f} -> {row['after']:.3f}" if row["after"] is not None else ""
        progress.say(f"tune: round {row['round']}, {row['component']} {verdict}{scored} ({row['reason']})")

    def _index(self, changed: Pair) -> dict[str, Any]:
        version = versions.read_version(self.pair.workspace, versions.current_version(self.pair.workspace))
        url = str(index.build_index(changed.used_in(self.settings)))
        found = artifacts.read_manifest(url)["num_documents"]
        expected = version.manifest["num_documents"]
        if found != expected:
            raise TuneError(
                f"{self.settings.corpus.path}: contains {found} documents and the index {expected}: tune.reindex indexes the "
                "corpus again, so both must contain the same documents; run: ragtune index CONFIG"
            )
        return {"index": url}


def _prepare_examples(settings: config.Config) -> dict[str, Any]:
    try:
        url = prepare.prepare(settings)
    except inputs.InputError as error:  # no question yields an example: a reason to refuse, not to stop the tune
        problem = str(error).removeprefix(f"{settings.queries.path}: ")
        return {"problem": problem, "num_examples": 0, "teacher": None}
    manifest = runs.read_manifest(url)
    return {
        "problem": "",
        "examples": url,
        "num_examples": manifest["num_train"],
        "teacher": manifest.get("teacher"),
        "num_rejects": manifest["num_rejects"],
        "kinds": manifest["kinds"],
    }


def _train_model(settings: config.Config) -> dict[str, Any]:
    result = train.train(settings)
    manifest = result.manifest
    return {
        "model": result.path,
        "query_model": manifest.get("query_model", ""),
        "num_examples": manifest["input"]["num_train"],
        "best_step": manifest["best"]["step"],
    }
