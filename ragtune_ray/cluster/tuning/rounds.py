"""What the rounds of `tune` are made of: a component trained on chosen questions, judged, and taken over or not.

In: questions to learn from. Out: a verdict in the ledger and, where it was good, another pair. Every step is one of the project's
own verbs on a file of questions that stands beside the ledger, so a person could have typed it. Nothing that anyone reads is
overwritten: a tuned model has a name of its own, an index for a tuned encoder a workspace of its own, and a pair that is refused
is simply not named. This module knows nothing of why these questions were chosen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster.indexing import index
from ragtune_ray.cluster.training import prepare, train
from ragtune_ray.cluster.tuning import judging
from ragtune_ray.index import versions
from ragtune_ray.ingest import inputs, splits
from ragtune_ray.models.arms import Pair
from ragtune_ray.storage import artifacts, filesystem
from ragtune_ray.tuning import gates
from ragtune_ray.tuning.ledger import Ledger, Row

__all__ = ["Rounds", "TuneError"]


class TuneError(RagtuneError, ValueError):
    """Nothing can be tuned like this; the message says what to change."""


class Rounds:
    """A tune under way.

    Args:
        settings: of the tune.
        root: where its ledger, questions and indexes stand.
        ledger: its steps so far.
        pair: who retrieves and answers before anything was tuned.
    """

    def __init__(self, settings: config.Config, root: str, ledger: Ledger, pair: Pair) -> None:
        self.settings, self.root, self.ledger = settings, root, ledger
        self.pair = pair
        """Who retrieves and answers now: the last that was accepted."""
        self.number = 1
        """Of the round."""
        self.forbidden = {
            name
            for split in ("validation", "test")
            for query in judging.queries_of(settings, split)
            for name in splits.positives(query)
        }
        """Documents that nothing may be learnt from: those of validation and test questions."""

    def step(self, name: str, work: Callable[[], Mapping[str, Any]], components: Sequence[str] = ()) -> Row:
        """A step of this round for these components, done once; see `Ledger.step`."""
        about = {"components": list(components)} if components else {}
        return self.ledger.step(self.number, name, lambda: {**about, **work()})

    def settings_with(self, pair: Pair, values: Mapping[str, Any]) -> config.Config:
        """The config with a pair's models and other values."""
        return pair.used_in(self.settings).with_values(values)

    def asking(self, path: str, values: Mapping[str, Any] | None = None, pair: Pair | None = None) -> config.Config:
        """The config that asks the questions of a file of this tune, by splits as they stand there, in the arm rag."""
        return self.settings_with(
            pair or self.pair,
            {
                "queries.path": path,
                "queries.split_by": "given",
                "queries.limit": 0,
                "queries.split": "train",
                "answer.arm": "rag",
                "answer.max_failed_share": 1,
                **(values or {}),
            },
        )

    def write(self, name: str, learnt: Sequence[schema.Query]) -> str:
        """A file of questions to learn from, and of the validation questions beside them."""
        rows = [dataclasses.replace(query, split="train") for query in learnt]
        rows += judging.queries_of(self.settings, "validation")
        lines = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows)
        url = filesystem.join(self.root, f"{self.number:02d}-{name}.jsonl")
        filesystem.replace_text(url, "".join(lines))
        return url

    def tune_generator(self, path: str, num_questions: int, start: str = "") -> bool:
        """Train the generator on the questions of a file, with the passages that the present retriever finds, and judge it.

        Args:
            path: of the file, from `write`.
            num_questions: of them to learn from.
            start: the model that training starts from; empty: the present generator.

        Returns:
            Whether it was taken over.
        """
        if not self._is_due("generator", num_questions):
            return False
        name = f"{self.settings.tune.mode}-generator"
        wanted = self.asking(
            path,
            {
                "training.objective": "sft",
                "training.teacher": "retrieval",
                "training.arm": "rag+ft",
                "training.name": name,
                "generator.model": start or self.pair.generator_model,
            },
        )
        trained = self._trained(["generator"], wanted)
        if trained is None:
            return False
        changed = dataclasses.replace(self.pair, generator_model=trained["model"])
        return self._judged("generator", changed, trained["num_examples"])

    def tune_retriever(self, path: str, num_questions: int, *, taught: bool) -> bool:
        """Train the retriever on the questions of a file, index the corpus for it where that is asked for, and judge it.

        Args:
            path: of the file, from `write`.
            num_questions: of them to learn from.
            taught: by the generator; else the positives of the questions are learnt, or a reranker's scores.

        Returns:
            Whether it was taken over.
        """
        if not self._is_due("retriever", num_questions):
            return False
        rule = self.settings.tune
        objective = "query_side"
        if rule.reindex:
            objective = "distillation" if taught or self.settings.retrieval.reranker else "contrastive"
        wanted = self.asking(
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
        trained = self._trained(["retriever"], wanted)
        if trained is None:
            return False
        changed = dataclasses.replace(self.pair, query_model=trained["model"])
        if rule.reindex:
            workspace = filesystem.join(self.root, f"{self.number:02d}")
            changed = Pair(workspace, trained["model"], "", self.pair.generator_model)
            self.step("corpus indexed", lambda: self._indexed(changed), ["retriever"])
        return self._judged("retriever", changed, trained["num_examples"])

    def tune_both(self, path: str, num_questions: int) -> bool:
        """Train generator and retriever at once on the questions of a file, then judge one after the other.

        Args:
            path: of the file, from `write`.
            num_questions: of them to learn from.

        Returns:
            Whether either was taken over.
        """
        both: tuple[config.Component, ...] = ("retriever", "generator")
        # Each of them is asked, so that each has its verdict.
        due = [self._is_due(component, num_questions) for component in both]
        if not all(due):
            return False
        wanted = self.asking(
            path,
            {
                "training.objective": "joint",
                "training.name": f"{self.settings.tune.mode}-both",
                "training.teacher": "retrieval",
                "training.hard_negatives": self.settings.tune.candidates - 1,
                "generator.model": self.pair.generator_model,
            },
        )
        trained = self._trained(both, wanted)
        if trained is None:
            return False
        found = dataclasses.replace(self.pair, query_model=trained["query_model"])
        took = [self._judged("retriever", found, trained["num_examples"])]
        # With the retriever that there is now: its own, or the one before where that finds more.
        read = dataclasses.replace(self.pair, generator_model=trained["model"])
        took.append(self._judged("generator", read, trained["num_examples"]))
        return any(took)

    def _is_due(self, component: config.Component, num_questions: int) -> bool:
        rule = self.settings.tune
        if component not in rule.components:
            return False
        if num_questions < rule.min_examples:
            return self._refused(
                component,
                f"{num_questions} questions to learn from, fewer than tune.min_examples ({rule.min_examples})",
            )
        return True

    def _trained(self, components: Sequence[config.Component], wanted: config.Config) -> Row | None:
        """What is trained for components as a config says; None where that was refused."""
        rule, name = self.settings.tune, " and ".join(components)
        given = self.step(f"{name} prepared", lambda: _prepared(wanted), components)
        problem = given["problem"]
        if not problem and given["num_examples"] < rule.min_examples:
            problem = f"{given['num_examples']} examples, fewer than tune.min_examples ({rule.min_examples})"
        if not problem and given["teacher"]:
            problem = gates.teacher_problem(given["teacher"])
        if problem:
            for component in components:
                self._refused(component, problem, given["num_examples"])
            return None
        trained = self.step(f"{name} trained", lambda: _model(wanted), components)
        if not trained["best_step"]:
            for component in components:
                self._refused(component, "training found nothing better than the start", trained["num_examples"])
            return None
        return trained

    def _refused(self, component: config.Component, reason: str, num_examples: int = 0) -> bool:
        verdict = gates.refused(component, reason, num_examples)
        self._say(self.step(f"{component} judged", verdict.facts))
        return False

    def _judged(self, component: config.Component, changed: Pair, num_examples: int) -> bool:
        """The verdict on a changed pair, which is taken over where it is good: the one place where the pair changes."""

        def verdict() -> dict[str, Any]:
            judge = judging.judge_generator if component == "generator" else judging.judge_retriever
            return {**judge(self.settings, self.pair, changed, num_examples).facts(), "pair": changed.facts()}

        row = self.step(f"{component} judged", verdict)
        self._say(row)
        if row["accepted"]:
            self.pair = changed
        return bool(row["accepted"])

    def _say(self, row: Row) -> None:
        verdict = "accepted" if row["accepted"] else "refused"
        scored = f": {row['metric']} {row['before']:.3f} -> {row['after']:.3f}" if row["after"] is not None else ""
        progress.say(f"tune: round {row['round']}, {row['component']} {verdict}{scored} ({row['reason']})")

    def _indexed(self, changed: Pair) -> dict[str, Any]:
        """The corpus, indexed with a tuned encoder in a workspace of its own, beside the one that is in use."""
        version = versions.read_version(self.pair.workspace, versions.current_version(self.pair.workspace))
        url = str(index.build_index(changed.used_in(self.settings)))
        found = artifacts.read_manifest(url)["num_documents"]
        if found != version.manifest["num_documents"]:
            raise TuneError(
                f"{self.settings.corpus.path}: holds {found} documents and the index {version.manifest['num_documents']}: with "
                "tune.reindex the corpus is indexed anew, so it must be what the index holds; run: ragtune index CONFIG"
            )
        return {"index": url}


def _prepared(settings: config.Config) -> dict[str, Any]:
    """The examples that a config asks for; where the generator teaches, that is the step of expectation."""
    try:
        url = prepare.prepare(settings)
    except inputs.InputError as error:  # no question gives an example: a verdict, and no end of the tune
        problem = str(error).removeprefix(f"{settings.queries.path}: ")
        return {"problem": problem, "num_examples": 0, "teacher": None}
    manifest = artifacts.read_manifest(url)
    names = ("num_rejects", "kinds")
    return {
        "problem": "",
        "examples": url,
        "num_examples": manifest["num_train"],
        "teacher": manifest.get("teacher"),
        **{name: manifest[name] for name in names},
    }


def _model(settings: config.Config) -> dict[str, Any]:
    result = train.train(settings)
    manifest = result.manifest
    return {
        "model": result.path,
        "query_model": manifest.get("query_model", ""),
        "num_examples": manifest["input"]["num_train"],
        "best_step": manifest["best"]["step"],
    }
