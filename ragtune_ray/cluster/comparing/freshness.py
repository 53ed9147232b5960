"""Measures how soon each arm's answers reflect a change of the documents, and whether they are then right.

The changes are applied to a copy of the index.
"""

from __future__ import annotations

import math
import time

from ragtune_ray import config, schema
from ragtune_ray.cluster import staged_queries
from ragtune_ray.cluster.answering import answer, evaluate
from ragtune_ray.cluster.indexing import update
from ragtune_ray.evaluation import intervals
from ragtune_ray.index import snapshot, versions
from ragtune_ray.models import arms
from ragtune_ray.storage import checksums, filesystem
from ragtune_ray.training.manifest import TrainingCost


def follow_changes(settings: config.Config) -> tuple[config.Config, float]:
    """Apply the changes of `compare` to a copy of an arm's index.

    Returns:
        The config with the copy as its workspace, and the seconds until the changed index (if it has several shards, the one
        with its newest segments) has answered a query.
    """
    from ragtune_ray.index.retriever import open_retriever

    scratch = _scratch(settings)
    filesystem.copy_tree(filesystem.join(settings.workspace, "index"), filesystem.join(scratch, "index"))
    changed = settings.with_values({"workspace": scratch})
    started = time.monotonic()
    if settings.compare.changes_path:
        update.upsert_documents(changed, settings.compare.changes_path)
    if settings.compare.deleted:
        update.delete_documents(changed, settings.compare.deleted)
    opened = open_retriever(changed, shard=_last_shard(changed))
    opened.retrieve_passages([_questions(settings)[0].text], settings.retrieval.top_k)
    return changed, time.monotonic() - started


def _last_shard(settings: config.Config) -> list[int] | None:
    """The segments of the shard with the newest ones, which the changes added; None if the index is one shard."""
    latest = versions.read_version(settings.workspace, versions.current_version(settings.workspace))
    groups = snapshot.shards(settings.workspace, latest, settings.cluster.shard_bytes)
    return groups[-1] if len(groups) > 1 else None


def changed_scores(settings: config.Config, changed: config.Config, arm: config.Arm) -> intervals.Interval | None:
    """An arm's `compare.metric` on the questions about the change.

    Args:
        settings: of the comparison, whose workspace has the tuned models.
        changed: from `follow_changes` for this arm; its workspace has the changed index.
        arm: the arm; a tuned one answers with the model trained before the change.
    """
    tuned = arms.with_tuned_models(settings.with_values({"answer.arm": arm}))
    plain: config.Arm = "rag" if config.retrieves(arm) else "base"
    changed_settings = staged_queries.with_all_queries_of(tuned, settings.compare.changed_queries_path)
    changed_settings = changed_settings.with_values({"workspace": changed.workspace, "answer.arm": plain})
    # Without passages, only gold answers tell whether an answer is right.
    queries = [query for query in _questions(settings) if query.answers is not None or config.retrieves(arm)]
    scores = evaluate.scores_of(queries, str(answer.answer(changed_settings)), settings)
    return intervals.mean_of(scores, settings.compare.metric, settings)


def visible_seconds(arm: config.Arm, seconds_to_index: float, training: TrainingCost | None) -> float:
    """Seconds until an arm's answers reflect a change: the time to index it, or to train on it; infinite if never."""
    if config.retrieves(arm):
        return seconds_to_index
    return training["seconds"]["steps"] if training else math.inf


def remove_copy(settings: config.Config) -> None:
    """Remove the copy of the index, with the answers made from it."""
    filesystem.remove(_scratch(settings))


def _questions(settings: config.Config) -> list[schema.Query]:
    path = settings.compare.changed_queries_path
    found = staged_queries.judged_queries(staged_queries.with_all_queries_of(settings, path))
    if not found:
        raise evaluate.EvaluationError(
            f"{path}: no question has `answers`, so answers about the change cannot be scored; add gold answers"
        )
    return found


def _scratch(settings: config.Config) -> str:
    identity = checksums.digest([settings.compare.changes_path, settings.compare.deleted])
    return filesystem.join(settings.workspace, "runs", ".work", f"changed-{identity}")
