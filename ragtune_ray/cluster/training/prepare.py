"""Makes training and validation examples in bulk.

In: a config with queries that have splits. Out: `runs/examples-ID/` with `train.parquet` and `validation.parquet` (rows of the
objective's example type), `rejects.jsonl` and, if the objective keeps the index, `pool.parquet` (the vectors of all passages).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import runs, session, staged_queries, stages
from ragtune_ray.cluster.answering import finding, rewrite
from ragtune_ray.cluster.answering.passages import Found, Reader, Shown
from ragtune_ray.cluster.training.example_workers import Near, PrepareUnit, depth_of, searched_with
from ragtune_ray.ingest import inputs, queries, splits
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts, filesystem
from ragtune_ray.training import examples, teaching

TRAIN, VALIDATION, POOL = "train.parquet", "validation.parquet", "pool.parquet"
UNIT_QUERIES = 128
TAUGHT_UNIT_QUERIES = 64
"""Queries per unit if the generator scores every candidate, which is much slower. Candidates that the queries of a unit share are
scored once, so a file that keeps related questions together is faster."""
FORMAT = 3
"""Part of the examples' identity: raise it when a code change makes the same input lead to other examples."""
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
"""Fields of `training` on which the examples depend."""


def needs_index(settings: config.Training) -> bool:
    """Whether examples contain passages."""
    return settings.objective != "sft" or settings.arm == "rag+ft"


def prepare(settings: config.Config, session_stack: ExitStack | None = None) -> str:
    """Make the training and validation examples that `training` describes; returns the run's directory.

    Args:
        settings: the whole config.
        session_stack: if given, the Ray session is index_manifest for training and stays open until this stack is closed.

    Raises:
        LeakError: a document is relevant to queries of two splits.
        ChangedError: the file of queries changed between two readings of it.
        InputError: there are no training or no validation queries, or none of them yields an example.
    """
    given = queries.files_sha256(settings.queries.path) if settings.queries.path else ""
    with ExitStack() as stack:
        staged = {split: stack.enter_context(_staged(settings, split)) for split in ("train", "validation")}
        if settings.training.objective == "sft" and settings.training.replay_path:
            other = {"queries.path": settings.training.replay_path, "queries.split_by": "given"}
            replay = settings.with_values({**other, "queries.unindexed": "keep", "queries.own_documents": "auto"})
            staged["replay"] = stack.enter_context(_staged(replay, "all"))
        _refuse_leaks(settings, staged)
        queries.require_same_files(settings.queries.path, given)
        version, index_manifest = runs.index_version(settings) if needs_index(settings.training) else ("", {})
        searches = {split: _searching(settings, split, part, version) for split, part in staged.items()}
        run = runs.Run.of(settings, "examples", _identity(settings, staged, index_manifest, searches))
        if run.is_finished():
            return run.url
        if session_stack is not None:
            session_stack.enter_context(session.ray_session(settings.cluster, for_training=True))
        with run.session(version):
            summaries = {
                split: _make_split(run, version, split, part, searches[split]) for split, part in staged.items()
            }
        _publish(run, version, staged, summaries)
        return run.url


@contextmanager
def _staged(settings: config.Config, split: str) -> Iterator[staged_queries.StagedQueries]:
    with ExitStack() as stack:
        try:
            staged = stack.enter_context(staged_queries.staged_queries(settings.with_values({"queries.split": split})))
        except inputs.InputError as error:
            message = f"{error}; training needs queries of split {split}: set queries.split_by"
            raise inputs.InputError(message) from error
        yield staged


def _refuse_leaks(settings: config.Config, staged: dict[str, staged_queries.StagedQueries]) -> None:
    rows = {split: staged_queries.read_queries(part.url, 0, part.num_queries) for split, part in staged.items()}
    try:
        held_out = settings.queries.model_copy(update={"split": "test"})
        test = [row for row in splits.selected_queries(held_out) if isinstance(row, schema.Query)]
    except inputs.InputError:
        test = []  # the file has no test queries
    train = [*rows["train"], *rows.get("replay", [])]
    splits.check_leaks({"train": train, "validation": rows["validation"], "test": test})


def _searching(
    settings: config.Config, split: str, staged: staged_queries.StagedQueries, version: str
) -> rewrite.Searching:
    """How the texts are found with which a split's candidates are searched, as in answering."""
    return rewrite.Searching.of(settings, staged) if version and split != "replay" else rewrite.Searching(None)


def _identity(
    settings: config.Config,
    staged: dict[str, staged_queries.StagedQueries],
    index_manifest: dict[str, Any],
    searches: dict[str, rewrite.Searching],
) -> dict[str, Any]:
    """Everything on which the examples depend; `index_manifest` is the manifest of the index version, empty without an index."""
    training = settings.training
    uses_generator = training.trains_generator or training.learns_from_generator
    generator = weights.resolve(settings.generator.model).fingerprint if uses_generator else ""
    num_follow_ups = sum(part.num_follow_ups for part in staged.values())
    written = [each.url for each in searches.values() if each.url]
    return {
        "format": FORMAT,
        "queries": {split: part.fingerprint for split, part in staged.items()},
        **({"own_documents": "left out"} if staged["train"].stand_in_corpus and index_manifest else {}),
        "index": index_manifest.get("content_id"),
        "retrieval": runs.retrieval_identity(searched_with(settings), index_manifest, num_follow_ups)
        if index_manifest
        else None,
        **({"searches": [url.split("/")[-2] for url in written]} if written else {}),
        "encoder": runs.encoder_identity(settings) if index_manifest else None,
        "query_model": runs.query_model_fingerprint(settings) if index_manifest else "",
        "prompt": settings.prompt.model_dump(mode="json") if generator else None,
        "tokenizer": generator,
        "training": training.model_dump(mode="json", include=EXAMPLE_SETTINGS),
        "teaching": training.teacher_temperature if training.learns_from_generator else None,
        "seed": settings.seed,
    }


def _make_split(
    run: runs.Run, version: str, split: str, staged: staged_queries.StagedQueries, searches: rewrite.Searching
) -> list[stages.Summary]:
    settings, directory = run.settings, filesystem.join(run.work, split)
    searches.write(staged)
    learns_from_generator = settings.training.learns_from_generator
    units = staged_queries.units(staged, TAUGHT_UNIT_QUERIES if learns_from_generator else UNIT_QUERIES)
    arguments = {"settings": settings, "version": version, "staged": staged.url, "split": split, "directory": directory}
    arguments["searches"] = searches.url
    with ExitStack() as stack:
        if version and split != "replay":
            sft = settings.training.objective == "sft"
            searched, depth = searched_with(settings), depth_of(settings, split)
            wanted = finding.Wanted(searched, version, depth, searches.url, shown=Shown(gold=True, vectors=not sft))
            found, _ = finding.find(wanted, staged, f"{directory}-found")
            arguments["found"] = found
            if sft and settings.training.distractors == "passage":
                positives, units = _positive_passages(staged, units, found)
                near = stack.enter_context(staged_queries.staged_rows(settings.workspace, positives))
                wanted = finding.Wanted(searched, version, depth, shown=Shown())
                arguments["near"] = Near(near.url, finding.find(wanted, near, f"{directory}-near")[0])
        return runs.run_over_queries(f"examples ({split})", directory, units, PrepareUnit, arguments, settings.cluster)


def _positive_passages(
    staged: staged_queries.StagedQueries, units: Sequence[dict[str, Any]], found: Found
) -> tuple[list[schema.Query], list[dict[str, Any]]]:
    """The distinct positive passages of each unit, as queries, and the units with the range of these under "near"."""
    reader = Reader(found)
    asked: list[schema.Query] = []
    ranged = []
    for unit in units:
        rows = staged_queries.read_queries(staged.url, unit["start"], unit["stop"])
        golds = [
            examples.positive_passage(row, examples.Candidates(each.gold, each.retrieved, each.scores))
            for row, each in zip(rows, reader.of(rows, unit["start"]), strict=True)
        ]
        texts = {gold.passage_id: gold.text for gold in golds if gold is not None}
        ranged.append({**unit, "near": [len(asked), len(asked) + len(texts)]})
        asked += [schema.Query(name, text, None, (), (), "all") for name, text in texts.items()]
    return asked, ranged


def _publish(
    run: runs.Run,
    version: str,
    staged: dict[str, staged_queries.StagedQueries],
    summaries: dict[str, list[stages.Summary]],
) -> None:
    settings = run.settings
    rejects = [reject for part in staged.values() for reject in part.rejects]
    rejects += [schema.Reject(**row) for parts in summaries.values() for part in parts for row in part["rejects"]]
    train, validation = _tables(run, staged, summaries, rejects)
    staging = artifacts.stage(run.url)
    pq.write_table(train, staging / TRAIN, write_page_checksum=True)
    pq.write_table(validation, staging / VALIDATION, write_page_checksum=True)
    if settings.training.keeps_index:
        pools = [_merged(run.work, split, summaries, "pool.parquet") for split in ("train", "validation")]
        pq.write_table(_distinct(pa.concat_tables(pools)), staging / POOL, write_page_checksum=True)
    (staging / "rejects.jsonl").write_text(schema.reject_lines(rejects), encoding="utf-8")
    kinds = train["kind"].value_counts().to_pylist() if "kind" in train.column_names else []
    facts: runs.RunFacts = {
        "index_version": version,
        "input": {
            split: {"fingerprint": part.fingerprint, "num_queries": part.num_queries} for split, part in staged.items()
        },
        "num_train": train.num_rows,
        "num_validation": validation.num_rows,
        "kinds": {row["values"]: row["counts"] for row in kinds},
        "num_rejects": len(rejects),
    }
    if drawn := splits.record_id(settings.queries):
        facts["split_record_id"] = drawn
    if settings.training.learns_from_generator:
        judged = [teaching.Judgement(**each) for part in summaries["train"] for each in part["judgements"]]
        facts["teacher"] = teaching.teacher_facts(judged)
    run.publish(staging, facts)
    progress.say(
        f"examples: {train.num_rows:,} for training, {validation.num_rows:,} for validation"
        + (f"; {len(rejects):,} queries yielded none, first reason: {rejects[0].reason}" if rejects else "")
    )


def _tables(
    run: runs.Run,
    staged: dict[str, staged_queries.StagedQueries],
    summaries: dict[str, list[stages.Summary]],
    rejects: Sequence[schema.Reject],
) -> tuple[pa.Table, pa.Table]:
    settings = run.settings
    tables = {split: _merged(run.work, split, summaries, "examples.parquet") for split in staged}
    for split in ("train", "validation"):
        if not tables[split].num_rows:
            first = f"; the first: {rejects[0].place}: {rejects[0].reason}" if rejects else ""
            raise inputs.InputError(
                f"{settings.queries.path}: no {split} query of {staged[split].num_queries} yields an example{first}"
            )
    train = tables["train"]
    if "replay" in tables:
        count = examples.replay_count(train.num_rows, settings.training.replay_share)
        train = pa.concat_tables([train, _drawn(tables["replay"], count, settings.seed)])
    return train, _drawn(tables["validation"], settings.training.validation_examples, settings.seed)


def _merged(work: str, split: str, summaries: dict[str, list[stages.Summary]], suffix: str) -> pa.Table:
    return pa.concat_tables(list(runs.merged(filesystem.join(work, split), summaries[split], suffix)))


def _drawn(table: pa.Table, count: int, seed: int) -> pa.Table:
    """At most `count` rows, drawn by seed and query id, in their original order."""
    marks = [splits.draw(name, seed) for name in table["query_id"].to_pylist()]
    return table.take(pa.array(np.sort(np.argsort(marks, kind="stable")[:count])))


def _distinct(pool: pa.Table) -> pa.Table:
    """The first row of each passage."""
    _, first = np.unique(pool["passage_id"].to_numpy(), return_index=True)
    return pool.take(pa.array(np.sort(first)))
