"""The arms on the same held-out questions, and one of them recommended.

In: a config with an index and queries that have gold answers. Out: `runs/compare-ID/` with `comparison.json` and `report.html`.
Tuned models that are missing are trained first. Every arm answers once, in bulk; a comparison that was killed goes on where it
stopped.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import runs, session, staged_queries
from ragtune_ray.cluster.answering import answer, evaluate, retrieve
from ragtune_ray.cluster.comparing import freshness, measure
from ragtune_ray.cluster.training import train
from ragtune_ray.cluster.tuning import tune
from ragtune_ray.evaluation import adaptive, costs, decision, failures, intervals
from ragtune_ray.evaluation.report import html_page
from ragtune_ray.index import snapshot
from ragtune_ray.ingest import input_units, splits
from ragtune_ray.models import arms as arms_module
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts, filesystem

__all__ = ["compare", "read_comparison"]

FORMAT = 1
"""Of `comparison.json`."""
LIBRARIES = ("ragtune-ray", "ray", "torch", "transformers", "sentence-transformers", "faiss-cpu", "pyarrow")


def compare(settings: config.Config, command: str = "") -> str:
    """Compare the arms of `compare.arms` and recommend one.

    Args:
        settings: everything but `answer.arm`, `evaluate.arms` and `training.name` is used. Where an arm is tuned, the queries of
            the test split are taken if `queries.split` is `all`.
        command: how this was called, for the report.

    Returns:
        The directory with `comparison.json` and `report.html`.

    Raises:
        evaluation.EvaluationError: no query has gold answers, or a tuned model was trained on other splits than are compared on,
            or from another model than `generator.model`.
        answers.AnswerError: too many rows of an arm failed.
        storage.ArtifactError: an arm retrieves, and there is no sound index.
    """
    started = time.monotonic()
    arms = settings.compare.arms
    settings = evaluate.held_out(settings, arms)
    _require_inputs(settings)
    with session.ray_session(settings.cluster, for_training=any(map(config.is_tuned, arms))):
        for arm in arms:
            _train_if_missing(settings, arm)
        evaluated = str(evaluate.evaluate(settings.with_values({"evaluate.arms": arms})))
        queries = staged_queries.judged_queries(settings)
        golden = _gold_runs(settings, queries)
        found = _retrieval(settings, queries)
        identity = {
            "format": FORMAT,
            "evaluated": artifacts.read_manifest(evaluated)["manifest_sha256"],
            "golden": {name: artifacts.read_manifest(run)["manifest_sha256"] for name, run in golden.items()},
            "compare": settings.compare.model_dump(mode="json"),
            "calibrations": [
                dataclasses.asdict(calibrated)
                for arm in arms
                if config.retrieves(arm)
                and (calibrated := adaptive.read_calibration(settings.with_values({"answer.arm": arm})))
            ],
            "files": _fingerprints(settings),
            "prices": settings.prices.model_dump(mode="json"),
            "evaluate": settings.evaluate.model_dump(mode="json", exclude={"arms"}),
        }
        run = runs.Run.of(settings, "compare", identity, started=started)
        if run.is_finished():
            return run.url
        indexes = _indexes(settings) if settings.compare.changed_queries_path else {}
        changed = {workspace: freshness.follow_changes(of_arm) for workspace, of_arm in indexes.items()}
        measured = {arm: measure.measure(settings, arm, evaluated, queries, changed) for arm in arms}
        ceilings = _ceilings(settings, measured, golden, queries)
        result = _comparison(settings, measured, queries, found, ceilings)
    result["command"] = command
    result["seconds"] = run.seconds()
    _publish(run, result, evaluated, golden)
    for of_arm in indexes.values():
        freshness.remove_copy(of_arm)
    return run.url


def _require_inputs(settings: config.Config) -> None:
    """Whatever could not be read in the end is found before hours of training."""
    evaluate.require_index(settings, settings.compare.arms)
    evaluate.require_judged(settings, staged_queries.judged_queries(settings))
    _fingerprints(settings)


def _indexes(settings: config.Config) -> dict[str, config.Config]:
    """Workspace -> the config of an arm that searches its index: a mode that tuned the encoder has an index of its own."""
    of_arms = [
        arms_module.with_tuned_models(settings.with_values({"answer.arm": arm})) for arm in settings.compare.arms
    ]
    return {of_arm.workspace: of_arm for of_arm in of_arms}


def _fingerprints(settings: config.Config) -> list[Any]:
    """Of the files that `compare` names: a comparison is done again when one of them was changed."""
    rule = settings.compare
    asked = [path for path in (rule.changed_queries_path, rule.probe_path) if path]
    found: list[Any] = [staged_queries.fingerprint(staged_queries.asking(settings, path)) for path in asked]
    if rule.changes_path:
        files = input_units.plan_units(rule.changes_path, settings.corpus.unit_bytes).files
        found += [[file.path, file.sha256] for file in files]
    return found


def read_comparison(url: str) -> dict[str, Any]:
    """The content of a finished comparison's `comparison.json`."""
    path = artifacts.open_artifact(url, "compare").path
    found: dict[str, Any] = json.loads((path / "comparison.json").read_text(encoding="utf-8"))
    return found


def _publish(run: runs.Run, result: dict[str, Any], evaluated: str, golden: Mapping[str, str]) -> None:
    staging = artifacts.stage(run.url)
    result = failures.as_json(result)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (staging / "comparison.json").write_text(text, encoding="utf-8")
    (staging / "report.html").write_text(html_page.render(result), encoding="utf-8")
    verdict = {name: result["verdict"][name] for name in ("outcome", "arm", "headline")}
    run.publish(
        staging,
        {"evaluated": evaluated, "golden": dict(golden), "verdict": verdict, "seconds": result["seconds"]},
    )


def _train_if_missing(settings: config.Config, arm: config.Arm) -> None:
    """A tuned arm needs its model; one that stands there already must fit what is compared."""
    if not config.is_tuned(arm):
        return
    try:
        arms_module.tuned_model(settings.workspace, arm)
    except weights.ModelError:
        progress.say(f"compare: arm {arm} has no tuned model yet; training it")
        if config.is_mode(arm):
            tune.tune(settings.with_values({"tune.mode": arm}))
        else:
            train.train(settings.with_values({"training.objective": "sft", "training.arm": arm, "training.name": ""}))
        return
    evaluate.check_tuned(settings, arm)


def _can_be_read(query: schema.Query) -> bool:
    return bool(query.answers and splits.positives(query))


def _gold_runs(settings: config.Config, queries: Sequence[schema.Query]) -> dict[str, str]:
    """The runs in which the generators of the arms that retrieve answer from the gold passage."""
    arms = [arm for arm in settings.compare.arms if config.retrieves(arm)]
    # Queries without one fail, and are left out of what is compared; where they are most, nothing is learnt.
    if not settings.compare.gold_passages or sum(map(_can_be_read, queries)) < len(queries) / 2:
        return {}
    return {
        arm: str(
            answer.answer(
                settings.with_values({"answer.arm": arm, "answer.gold_passage": True, "answer.max_failed_share": 1})
            )
        )
        for arm in arms
    }


def _retrieval(settings: config.Config, queries: Sequence[schema.Query]) -> dict[str, Any] | None:
    """recall@k and the like of the index; None where no arm retrieves or no document is judged."""
    if not any(map(config.retrieves, settings.compare.arms)) or not any(map(splits.positives, queries)):
        return None
    run = artifacts.open_artifact(str(retrieve.retrieve(settings)), "retrieve").path
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return found


def _ceilings(
    settings: config.Config,
    measured: Mapping[config.Arm, measure.Measured],
    golden: Mapping[str, str],
    queries: Sequence[schema.Query],
) -> dict[str, dict[str, intervals.Interval]]:
    """Closed book, retrieved and gold passage for one generator, over the queries that have a gold passage."""
    metric = settings.compare.metric
    readable = {query.query_id for query in queries if _can_be_read(query)}
    given = {name: evaluate.read_answers(run) for name, run in golden.items()}
    readable -= {row.query_id for rows in given.values() for row in rows if row.status == "failed"}
    found: dict[str, dict[str, intervals.Interval]] = {}
    kinds: tuple[tuple[str, config.Arm, config.Arm], ...] = (
        ("base model", "base", "rag"),
        ("tuned model", "ft", "rag+ft"),
    )
    for name, closed, opened in kinds:
        rows = {
            "closed_book": measured[closed].scores if closed in measured else None,
            "retrieved": measured[opened].scores if opened in measured else None,
            "gold_passage": evaluate.scores_of(queries, given[opened], settings) if opened in given else None,
        }
        shown = {
            kind: failures.interval_of(failures.subset(scores, readable), metric, settings)
            for kind, scores in rows.items()
            if scores
        }
        found[name] = {kind: interval for kind, interval in shown.items() if interval is not None}
    return {name: shown for name, shown in found.items() if shown}


def _comparison(
    settings: config.Config,
    measured: Mapping[config.Arm, measure.Measured],
    queries: Sequence[schema.Query],
    found: dict[str, Any] | None,
    ceilings: dict[str, Any],
) -> dict[str, Any]:
    """Everything that `comparison.json` holds."""
    compared = decision.differences({arm: each.scores for arm, each in measured.items()}, settings)
    verdict = decision.decide({arm: each.evidence() for arm, each in measured.items()}, compared, settings)
    return {
        "format": FORMAT,
        "title": settings.queries.path,
        "verdict": {
            **{name: getattr(verdict, name) for name in ("outcome", "arm", "headline")},
            "reason": verdict.reason,
            "warnings": [*verdict.warnings, *_unpriced(settings)],
            "weighed": verdict.weighed,
        },
        "metric": settings.compare.metric,
        "margin": settings.compare.margin,
        "confidence": settings.evaluate.confidence,
        "questions": {
            "total": len(queries),
            "answerable": sum(bool(query.answers) for query in queries),
            "unanswerable": sum(query.answers == () for query in queries),
            "needed": max((each.needed_for_margin or 0 for each in compared), default=0) or None,
        },
        "arms": {arm: _arm(arm, each, settings, queries, verdict.violations[arm]) for arm, each in measured.items()},
        "ceilings": ceilings,
        "differences": compared,
        "retrieval": found,
        "break_even": _break_even({arm: each.cost for arm, each in measured.items()}),
        "examples": _examples(settings, measured, queries),
        "config": settings.model_dump(mode="json"),
        "versions": _versions(),
        "hardware": _hardware(),
        "created": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _unpriced(settings: config.Config) -> list[str]:
    if settings.generator.engine == "transformers":
        return []
    return [
        "base and rag are answered by a server: their cost is that of asking it; what it takes for generating is not in it."
    ]


def _arm(
    arm: config.Arm,
    measured: measure.Measured,
    settings: config.Config,
    queries: Sequence[schema.Query],
    violations: Sequence[str],
) -> dict[str, Any]:
    summary, explained = measured.summary, {"citation_precision", "citation_recall"}
    # A share of all rows says less than abstention quality and the statuses.
    elsewhere = explained | {"abstained", "failed"}
    return {
        "model": measured.settings.generator.model.removeprefix(filesystem.join(settings.workspace, "")),
        "model_fingerprint": measured.manifest["model"],
        "index_version": measured.manifest["index_version"],
        "statuses": {"ok": 0, "failed": 0, **measured.manifest["statuses"]},
        "quality": {name: each for name, each in summary.items() if name not in elsewhere},
        "explainability": {
            "cited_share": measured.cited,
            **{name: summary[name] for name in sorted(explained & summary.keys())},
        },
        "latency": measured.latency if config.retrieves(arm) else {**measured.latency, "retrieval": None},
        "throughput": {"answers_per_second": measured.manifest["queries_per_second"]},
        "cost": measured.cost,
        "freshness": {
            "visible_seconds": measured.visible_seconds,
            "changed": measured.changed,
        },
        "forgetting": measured.forgetting,
        "adaptive": measured.adaptive,
        "losses": failures.losses(
            [query for query in queries if query.answers], measured.rows, measured.scores, settings.compare.metric, arm
        ),
        "violations": violations,
        "rounds": (measured.training or {}).get("rounds", []),
    }


def _break_even(found: Mapping[str, costs.Cost]) -> list[dict[str, Any]]:
    """Pairs of which one costs more at first and less for each answer: from how many answers on it is the cheaper."""
    return [
        {"arm": arm, "against": other, "answers": number}
        for arm, cost in found.items()
        for other, against in found.items()
        if (number := costs.break_even(cost, against)) is not None
    ]


def _examples(
    settings: config.Config, measured: Mapping[config.Arm, measure.Measured], queries: Sequence[schema.Query]
) -> list[dict[str, Any]]:
    """Some questions with the answers of every arm and their sources."""
    metric, by_id = settings.compare.metric, {query.query_id: query for query in queries}
    scores = {arm: each.scores for arm, each in measured.items()}
    opened: dict[tuple[str, str], snapshot.Index] = {}

    def passages(of_arm: measure.Measured, row: schema.Answer) -> dict[str, schema.Passage]:
        if not row.passage_ids:
            return {}
        place = (of_arm.settings.workspace, of_arm.manifest["index_version"])
        if place not in opened:
            opened[place] = snapshot.open_index(*place)
        return opened[place].by_id(row.passage_ids)

    found = []
    for query_id in failures.most_telling(scores, metric, settings.compare.num_examples):
        query = by_id[query_id]
        rows = {arm: each.rows[query_id] for arm, each in measured.items()}
        found.append(
            {
                "query_id": query_id,
                "query": query.text,
                "gold": list(query.answers or ()),
                "answers": {
                    arm: failures.shown_answer(row, scores[arm][query_id][metric], passages(measured[arm], row))
                    for arm, row in rows.items()
                },
            }
        )
    return found


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def _hardware() -> dict[str, Any]:
    """Of the machine that drove the comparison."""
    import psutil
    import ray

    resources = ray.cluster_resources() if ray.is_initialized() else {}
    return {
        "cpu": _processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": sorted(name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")),
    }


def _processor_name() -> str:
    listed = Path("/proc/cpuinfo")
    names = listed.read_text(encoding="utf-8", errors="replace").splitlines() if listed.exists() else []
    return next((line.partition(":")[2].strip() for line in names if line.startswith("model name")), platform.machine())
