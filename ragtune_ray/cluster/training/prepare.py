"""Ray Data: queries (and an index) -> training examples, in bulk.

In: a config with queries that have splits. Out: a run directory with `train.parquet` and `validation.parquet`, rows of
`GeneratorExample` or `RetrieverExample`; for `query_side` also `pool.parquet`, the stored vectors of all their passages; and
`rejects.jsonl`. A document that is relevant to queries of two splits is an error before anything is retrieved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import runs, staged_queries
from ragtune_ray.cluster.training.example_workers import PrepareUnit
from ragtune_ray.ingest import inputs, splits
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts, filesystem
from ragtune_ray.training import examples, teaching

__all__ = ["POOL", "TRAIN", "VALIDATION", "needs_index", "prepare"]

TRAIN, VALIDATION, POOL = "train.parquet", "validation.parquet", "pool.parquet"
UNIT_QUERIES = 128
TAUGHT_UNIT_QUERIES = 64
"""The same where the generator reads every candidate: many times the work, but of neighbours' candidates many are the same, and
are read once. So a file of questions had better keep those of a document, and of documents of one subject, together."""
FORMAT = 3
"""Part of the examples' identity: raise it when the same input would give other examples."""
EXAMPLE_SETTINGS = {
    "objective",
    "arm",
    "max_tokens",
    "validation_examples",
    "passages",
    "distractors",
    "gold_left_out_share",
    "abstain_share",
    "abstention",
    "cite",
    "replay_share",
    "teacher",
    "hard_negatives",
    "negative_depth",
    "negative_margin",
}
"""Fields of `training` that examples depend on."""


def needs_index(settings: config.Training) -> bool:
    """Whether examples show or contrast passages."""
    return settings.objective != "sft" or settings.arm == "rag+ft"


def prepare(settings: config.Config) -> str:
    """Make the training and validation examples that `training` describes.

    Args:
        settings: workspace, seed, queries, index, encoder, retrieval, prompt, generator, training and cluster are used.

    Returns:
        The run's directory.

    Raises:
        splitting.LeakError: splits share a relevant document.
        inputs.InputError: there are no training or no validation queries, or none gives an example.
        stages.StageError: the stage failed.
    """
    with ExitStack() as stack:
        staged = {}
        for split in ("train", "validation"):
            staged[split] = stack.enter_context(_staged(settings, split))
        if settings.training.objective == "sft" and settings.training.replay_path:
            replay = settings.with_values({"queries.path": settings.training.replay_path, "queries.split_by": "given"})
            staged["replay"] = stack.enter_context(_staged(replay, "all"))
        _refuse_leaks(settings, staged)
        return _prepare(settings, staged)


@contextmanager
def _staged(settings: config.Config, split: str) -> Iterator[staged_queries.StagedQueries]:
    with ExitStack() as stack:
        try:
            staged = stack.enter_context(staged_queries.staged_queries(settings.with_values({"queries.split": split})))
        except inputs.InputError as error:
            raise inputs.InputError(
                f"{error}; training needs queries of split {split}: set queries.split_by"
            ) from error
        yield staged


def _refuse_leaks(settings: config.Config, staged: dict[str, staged_queries.StagedQueries]) -> None:
    rows = {split: staged_queries.read_queries(part.url, 0, part.num_queries) for split, part in staged.items()}
    learnt = {"train": [*rows["train"], *rows.get("replay", [])], "validation": rows["validation"]}
    try:
        held_out = settings.queries.model_copy(update={"split": "test"})
        test = [row for row in splits.selected_queries(held_out) if isinstance(row, schema.Query)]
    except inputs.InputError:
        test = []  # a file without test queries has none that could leak
    splits.check_leaks({**learnt, "test": test})


def _prepare(settings: config.Config, staged: dict[str, staged_queries.StagedQueries]) -> str:
    version, opened = runs.index_version(settings) if needs_index(settings.training) else ("", {})
    training = settings.training
    reads = training.trains_generator or training.learns_from_generator
    generator = weights.resolve(settings.generator.model).fingerprint if reads else ""
    identity = {
        "format": FORMAT,
        "queries": {split: part.fingerprint for split, part in staged.items()},
        "index": opened.get("content_id"),
        "retrieval": settings.retrieval.model_dump(mode="json") if opened else None,
        "encoder": settings.encoder.model_dump(mode="json", exclude={"model", "query_model"}) if opened else None,
        "query_model": runs.query_model_fingerprint(settings) if opened else "",
        "prompt": settings.prompt.model_dump(mode="json") if generator else None,
        "tokenizer": generator,
        "training": training.model_dump(mode="json", include=EXAMPLE_SETTINGS),
        "teaching": training.teacher_temperature if training.learns_from_generator else None,
        "seed": settings.seed,
    }
    run = runs.Run.of(settings, "examples", identity)
    if run.is_finished():
        return run.url
    summaries = {}
    shared = {"settings": settings, "version": version}
    with run.session(version):
        for split, part in staged.items():
            directory = filesystem.join(run.work, split)
            arguments = {**shared, "staged": part.url, "split": split, "directory": directory}
            units = staged_queries.units(part, TAUGHT_UNIT_QUERIES if training.learns_from_generator else UNIT_QUERIES)
            summaries[split] = runs.run_over_queries(
                f"examples ({split})", directory, units, PrepareUnit, arguments, settings.cluster
            )
    _publish(run, version, staged, summaries)
    return run.url


def _publish(
    run: runs.Run,
    version: str,
    staged: dict[str, staged_queries.StagedQueries],
    summaries: dict[str, list[dict[str, Any]]],
) -> None:
    settings, work = run.settings, run.work
    tables = {split: _together(filesystem.join(work, split), summaries[split], "examples.parquet") for split in staged}
    rejects = [reject for part in staged.values() for reject in part.rejects]
    rejects += [schema.Reject(**row) for parts in summaries.values() for part in parts for row in part["rejects"]]
    for split in ("train", "validation"):
        if not tables[split].num_rows:
            first = f"; the first: {rejects[0].place}: {rejects[0].reason}" if rejects else ""
            raise inputs.InputError(
                f"{settings.queries.path}: no {split} query of {staged[split].num_queries} gives an example{first}"
            )
    train, validation = (
        tables["train"],
        _drawn(tables["validation"], settings.training.validation_examples, settings.seed),
    )
    if "replay" in tables:
        count = examples.replay_count(train.num_rows, settings.training.replay_share)
        train = pa.concat_tables([train, _drawn(tables["replay"], count, settings.seed)])
    staging = artifacts.stage(run.url)
    pq.write_table(train, staging / TRAIN, write_page_checksum=True)
    pq.write_table(validation, staging / VALIDATION, write_page_checksum=True)
    if settings.training.keeps_index:
        pools = [
            _together(filesystem.join(work, split), summaries[split], "pool.parquet")
            for split in ("train", "validation")
        ]
        pq.write_table(_distinct(pa.concat_tables(pools)), staging / POOL, write_page_checksum=True)
    (staging / "rejects.jsonl").write_text(schema.reject_lines(rejects), encoding="utf-8")
    facts: runs.RunFacts = {
        "index_version": version,
        "input": {split: {"fingerprint": p.fingerprint, "num_queries": p.num_queries} for split, p in staged.items()},
    }
    if settings.training.learns_from_generator:
        judged = [teaching.Judgement(**each) for part in summaries["train"] for each in part["judgements"]]
        facts["teacher"] = teaching.teacher_facts(judged)
    kinds = train["kind"].value_counts().to_pylist() if "kind" in train.column_names else []
    facts |= {
        "num_train": train.num_rows,
        "num_validation": validation.num_rows,
        "kinds": {row["values"]: row["counts"] for row in kinds},
        "num_rejects": len(rejects),
    }
    run.publish(staging, facts)
    progress.say(
        f"examples: {train.num_rows:,} to learn, {validation.num_rows:,} to validate"
        + (f", {len(rejects):,} queries gave none; the first: {rejects[0].reason}" if rejects else "")
    )


def _together(directory: str, summaries: Sequence[dict[str, Any]], suffix: str) -> pa.Table:
    return pa.concat_tables(list(runs.merged(directory, summaries, suffix)))


def _drawn(table: pa.Table, count: int, seed: int) -> pa.Table:
    """At most so many rows, drawn by the seed and the query's id; in the order they had."""
    marks = [splits.draw(name, seed) for name in table["query_id"].to_pylist()]
    return table.take(pa.array(np.sort(np.argsort(marks, kind="stable")[:count])))


def _distinct(pool: pa.Table) -> pa.Table:
    """The first row of each passage."""
    _, first = np.unique(pool["passage_id"].to_numpy(), return_index=True)
    return pool.take(pa.array(np.sort(first)))
