"""Measures what the four modes of `tune` gain on SQuAD test articles, each against a baseline.

    python -m bench.modes [section.field=value ...] [--modes staged joint iterative domain independent] [--minutes 60]

The splits are those of configs/squad.yaml, by article. Each mode tunes the embedded models in a workspace of its own
and is evaluated once on the test articles. Both sides of the encoder are trained unless `tune.reindex=false` is given.

| row | what is compared |
|---|---|
| staged | EM after tuning on routed failures, and after plain rag+ft on the same number of random training questions |
| joint | dense recall@1 before and after, with all qrels of the training questions hidden |
| iterative | EM after the last accepted round, and after tuning on the labelled half alone; precision of the pseudo-labels |
| domain | dense recall@1 before and after; no training question is used |
| independent | EM and recall@1 of the `joint` pair, and of both models tuned separately with the same number of optimizer steps |

Every row has a paired interval and the verdicts of its rounds. Rows without a gain are printed, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ragtune_ray import config, schema
from ragtune_ray.cluster import session
from ragtune_ray.cluster.answering import answer, evaluate, retrieve
from ragtune_ray.cluster.indexing import index
from ragtune_ray.cluster.training import train
from ragtune_ray.cluster.tuning import tune
from ragtune_ray.cluster.tuning.judging import queries_of
from ragtune_ray.evaluation import intervals
from ragtune_ray.evaluation.questions.writing.agreement import says_the_same
from ragtune_ray.ingest import splits
from ragtune_ray.models.arms import Pair
from ragtune_ray.storage import filesystem
from ragtune_ray.tuning.ledger import Ledger, Row

DATA = "../shared/data/squad/squad-v1.1-24articles.json"
CONFIG = "configs/squad.yaml"
STEPS = {15: 60, 30: 130, 60: 200}
"""Minutes on two cores with bfloat16 -> largest number of optimizer steps per component and round."""
VALIDATION_QUESTIONS = 240
ANSWERED_QUESTIONS = 300
"""Test questions that are answered, since generation is slow. Recall covers all test questions."""

Scores = dict[str, float]


def main() -> None:
    """Run the chosen modes and print their lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", help="settings that override configs/squad.yaml, such as cluster.gpus_per_worker=1"
    )
    parser.add_argument("--modes", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--minutes", type=int, default=60, choices=list(STEPS))
    parser.add_argument("--questions", type=int, default=800, help="training questions")
    parser.add_argument("--workspace", default="workspace/modes")
    options = parser.parse_args()
    if not Path(DATA).exists():
        parser.error(f"{DATA} does not exist; this benchmark needs it")
    with session.ray_session(config.Cluster(), for_training=True):
        for name in options.modes:
            started = time.monotonic()
            folder = Path(options.workspace) / ("joint" if name == "independent" else name)
            folder.mkdir(parents=True, exist_ok=True)
            settings = _settings(folder, options.minutes, options.questions, options.overrides)
            index.build_index(settings)
            for line in RUNS[name](settings, folder):
                print(f"{name:12} {line}", flush=True)
            print(f"{name:12} {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


def _settings(folder: Path, minutes: int, num_questions: int, overrides: Sequence[str]) -> config.Config:
    """Write the questions of a row with their splits to a file and return the config that reads it."""
    settings = config.load(CONFIG, [f"corpus.path={DATA}", f"queries.path={DATA}", *overrides])
    source = random.Random(0)
    rows = _sample_by_document(queries_of(settings, "train"), num_questions, source)
    validation, test = (queries_of(settings, split) for split in ("validation", "test"))
    validation = source.sample(validation, min(VALIDATION_QUESTIONS, len(validation)))
    test = source.sample(test, len(test))  # shuffled, since only the first ANSWERED_QUESTIONS are answered
    rows += [dataclasses.replace(row, split="validation") for row in validation]
    rows += [dataclasses.replace(row, split="test") for row in test]
    path = folder / "questions.jsonl"
    _write(path, rows)
    return settings.using(
        f"workspace={folder}", f"queries.path={path}", "queries.split_by=given", "queries.split=all",
        f"training.max_steps={STEPS[minutes]}", f"training.evaluate_steps={STEPS[minutes] // 2}",
        "compare.metric=EM", "retrieval.mode=dense", "retrieval.top_k=1", "answer.reading=together",
        "tune.rounds=2", "tune.reindex=true", "tune.candidates=4",
        "tune.retriever_learning_rate=5e-5", "training.contrastive_weight=1", *overrides,
    )  # fmt: skip


def _sample_by_document(found: Sequence[schema.Query], limit: int, source: random.Random) -> list[schema.Query]:
    """Return all questions of randomly chosen documents, about `limit` in total, in file order."""
    documents: dict[str, list[schema.Query]] = {}
    for row in found:
        documents.setdefault(row.document_ids[0], []).append(row)
    chosen: set[str] = set()
    count = 0
    for document in source.sample(sorted(documents), len(documents)):
        if count >= limit:
            break
        chosen.add(document)
        count += len(documents[document])
    return [dataclasses.replace(row, split="train") for row in found if row.document_ids[0] in chosen]


def _write(path: Path, rows: Sequence[schema.Query]) -> None:
    path.write_text("".join(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows), "utf-8")


def _with_training_questions(
    settings: config.Config, folder: Path, name: str, change: Callable[[schema.Query], schema.Query]
) -> config.Config:
    """Return a config whose training questions are changed."""
    rows = [change(row) if row.split == "train" else row for row in queries_of(settings, "all")]
    _write(folder / name, rows)
    return settings.using(f"queries.path={folder / name}")


def _tuned(settings: config.Config, mode: str) -> tuple[Pair, list[Row]]:
    result = tune.tune(settings.using(f"tune.mode={mode}"))
    return Pair(**result.manifest["pair"]), Ledger(filesystem.join(result.path, tune.LEDGER)).rows


def _em(settings: config.Config) -> Scores:
    for_test = settings.using("queries.split=test", f"queries.limit={ANSWERED_QUESTIONS}", "answer.arm=rag")
    scores = evaluate.scores_of(queries_of(for_test, "test"), str(answer.answer(for_test)), settings)
    return {name: values["EM"] for name, values in scores.items()}


def _recall(settings: config.Config) -> Scores:
    run = str(retrieve.retrieve(settings.using("queries.split=test")))
    rows = pq.read_table(Path(run) / "scores.parquet").to_pylist()
    return {row["query_id"]: row["recall@1"] for row in rows}


def _line(metric: str, first: str, before: Scores, second: str, after: Scores) -> str:
    ids = sorted(before.keys() & after.keys())
    a, b = (np.array([scores[name] for name in ids]) for scores in (before, after))
    gain = intervals.paired_bootstrap(a, b, 10_000, 0.95, 0)
    return (
        f"{metric} {first} {a.mean():.4f}, {second} {b.mean():.4f}: {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}], "
        f"{len(ids)} questions"
    )


def _verdicts(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if "accepted" in row]
    return [
        f"round {row['round']} {row['component']} {'accepted' if row['accepted'] else 'refused'}: {row['reason']}"
        for row in found
    ] + [f"teacher {json.dumps(row['teacher'])}" for row in rows if row.get("teacher")]


def _staged(settings: config.Config, folder: Path) -> list[str]:
    pair, rows = _tuned(settings, "staged")
    (routed,) = [row for row in rows if row["step"] == "routed"]
    count = routed["generator"]["num_questions"]
    drawn = {row.query_id for row in random.Random(1).sample(queries_of(settings, "train"), count)}
    kept = [row for row in queries_of(settings, "all") if row.split != "train" or row.query_id in drawn]
    _write(folder / "random.jsonl", kept)
    plain = settings.using(f"queries.path={folder / 'random.jsonl'}", "training.name=random")
    other = dataclasses.replace(Pair.of(settings), generator_model=train.train(plain).path)
    routes = ", ".join(f"{name} {row['count']}" for name, row in routed["routes"].items())
    return [
        _line("EM", f"random {count}", _em(other.used_in(settings)), "staged", _em(pair.used_in(settings))),
        routes,
        *_verdicts(rows),
    ]


def _without_qrels(settings: config.Config, folder: Path) -> config.Config:
    """Return a config whose training questions name no document."""
    return _with_training_questions(
        settings, folder, "hidden.jsonl", lambda row: dataclasses.replace(row, document_ids=(), relevances=())
    )


def _joint(settings: config.Config, folder: Path) -> list[str]:
    pair, rows = _tuned(_without_qrels(settings, folder), "joint")
    return [
        _line("recall@1", "before", _recall(settings), "after", _recall(pair.used_in(settings))),
        _line("EM", "before", _em(settings), "after", _em(pair.used_in(settings))),
        *_verdicts(rows),
    ]


def _iterative(settings: config.Config, folder: Path) -> list[str]:
    half = _with_training_questions(
        settings,
        folder,
        "half.jsonl",
        lambda row: dataclasses.replace(row, answers=None) if splits.draw(row.query_id, 0) < 0.5 else row,
    )
    pair, rows = _tuned(half, "iterative")
    labelled = next((row["pair"] for row in rows if row["round"] == 0 and row.get("accepted")), None)
    alone = Pair(**labelled) if labelled else Pair.of(settings)
    gold = {f"asked-{row.query_id}": row.answers or () for row in queries_of(settings, "train")}
    lines = [_line("EM", "labelled half", _em(alone.used_in(settings)), "iterative", _em(pair.used_in(settings)))]
    for row in rows:
        if row["step"] == "trusted":
            lines.append(
                f"round {row['round']}: trusted from confidence {row['confidence']}, precision {row['precision']}"
            )
        if row["step"] == "passed":
            made = [each for each in _queries(row["path"]) if each.query_id in gold]
            right = [says_the_same((each.answers or ("",))[0], gold[each.query_id], "en") for each in made]
            lines.append(f"round {row['round']}: {len(made)} pseudo-labels, precision {np.mean(right or [False]):.3f}")
    return lines + _verdicts(rows)


def _queries(path: str) -> list[schema.Query]:
    from ragtune_ray.ingest.queries import read_queries

    return [row for row in read_queries(path) if isinstance(row, schema.Query)]


def _domain(settings: config.Config, folder: Path) -> list[str]:
    unknown = _with_training_questions(
        settings, folder, "unknown.jsonl", lambda row: dataclasses.replace(row, answers=None)
    )
    pair, rows = _tuned(unknown, "domain")
    return [
        _line("recall@1", "before", _recall(settings), "after", _recall(pair.used_in(settings))),
        *(f"{row['step']}: kept {row['count']}, refused {row['refused']}" for row in rows if "refused" in row),
        *_verdicts(rows),
    ]


def _independent(settings: config.Config, folder: Path) -> list[str]:
    """Tune each model separately on the same questions, with the total number of steps of the joint rounds."""
    hidden = _without_qrels(settings, folder)
    pair, _ = _tuned(hidden, "joint")
    total = settings.training.max_steps * settings.tune.rounds
    longer = hidden.using(f"training.max_steps={total}", "training.epochs=4")
    generator = train.train(longer.using("training.name=alone")).path
    retriever = train.train(
        longer.using(
            f"training.objective={'contrastive' if settings.tune.reindex else 'query_side'}",
            "training.name=alone-retriever",
            f"training.learning_rate={settings.tune.retriever_learning_rate}",
        )
    ).path
    if settings.tune.reindex:
        apart = Pair(str(folder / "alone"), retriever, "", generator)
        index.build_index(apart.used_in(settings))
    else:
        apart = dataclasses.replace(Pair.of(settings), generator_model=generator, query_model=retriever)
    return [
        _line("EM", "independent", _em(apart.used_in(settings)), "joint", _em(pair.used_in(settings))),
        _line("recall@1", "independent", _recall(apart.used_in(settings)), "joint", _recall(pair.used_in(settings))),
    ]


RUNS: dict[str, Callable[[config.Config, Path], list[str]]] = {
    "staged": _staged,
    "joint": _joint,
    "iterative": _iterative,
    "domain": _domain,
    "independent": _independent,
}


if __name__ == "__main__":
    main()
