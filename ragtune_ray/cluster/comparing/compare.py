"""`ragtune compare`: runs the arms on the same held-out questions and recommends one.

In: a config with an index and queries that have gold answers. Out: `runs/compare-ID/` with `comparison.json` and `report.html`.
Missing tuned models are trained first. A killed comparison resumes where it stopped.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import runs, session, staged_queries
from ragtune_ray.cluster.answering import answer, evaluate, retrieve
from ragtune_ray.cluster.comparing import check, freshness, measure, variants
from ragtune_ray.cluster.training import train
from ragtune_ray.cluster.tuning import tune
from ragtune_ray.evaluation import adaptive, comparison, costs, decision, failures, intervals
from ragtune_ray.evaluation.comparison import ArmResult, BreakEven, Ceilings, Comparison
from ragtune_ray.evaluation.report import examples, html_page
from ragtune_ray.index import snapshot
from ragtune_ray.ingest import input_units, splits
from ragtune_ray.models import arms as arms_module
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts, filesystem
from ragtune_ray.storage.results import Result

LIBRARIES = ("ragtune-ray", "ray", "torch", "transformers", "sentence-transformers", "faiss-cpu", "pyarrow")


class ComparisonResult(Result):
    """A finished comparison: a directory with `comparison.json` and `report.html`."""

    @property
    def comparison(self) -> Comparison:
        """The measurements and the verdict."""
        return comparison.read(read_comparison(self.path))

    def to_arrow(self) -> pa.Table:
        """One row per arm and metric: arm, metric, value, low, high, n."""
        rows = [
            {"arm": arm, "metric": metric, **dataclasses.asdict(interval)}
            for arm, measured in self.comparison.arms.items()
            for metric, interval in {**measured.quality, **measured.explainability}.items()
            if interval is not None
        ]
        return pa.Table.from_pylist(rows)


def compare(settings: config.Config, command: str = "") -> ComparisonResult:
    """Compare the arms of `compare.arms` and recommend one. `command` is the command line, for the report.

    If an arm is tuned, `queries.split=all` means the test split.

    Raises:
        EvaluationError: no query has gold answers, or a tuned model was trained on other splits or from another base model.
        AnswerError: too many rows of an arm failed.
        ArtifactError: an arm retrieves, and there is no sound index.
    """
    started = time.monotonic()
    arms = settings.compare.arms
    settings = given = variants.held_out(evaluate.held_out(settings, arms))
    _require_inputs(settings)
    check.say(settings)
    with session.ray_session(settings.cluster, for_training=any(map(config.is_tuned, arms))):
        settings, searched = variants.settle(settings)
        for arm in arms:
            _train_if_missing(settings, arm)
        evaluated = str(evaluate.evaluate(settings.with_values({"evaluate.arms": arms})))
        queries = staged_queries.judged_queries(settings)
        golden = _gold_runs(settings, queries)
        retrieval = _retrieval(settings, queries)
        run = runs.Run.of(given, "compare", _identity(settings, evaluated, golden, searched), started=started)
        if run.is_finished():
            return ComparisonResult(run.url)
        indexes = _indexes(settings) if settings.compare.changed_queries_path else {}
        changed = {workspace: freshness.follow_changes(of_arm) for workspace, of_arm in indexes.items()}
        latencies = measure.measure_latencies(settings, evaluated, queries)
        measured = {
            arm: measure.measure(settings, arm, evaluated, queries, changed, one_by_one)
            for arm, one_by_one in latencies.items()
        }
        ceilings = _ceilings(settings, measured, golden, queries)
        found = _comparison(settings, measured, queries, retrieval, ceilings)
        if searched:
            found = found.model_copy(update={"variants": searched})
    _publish(run, found.model_copy(update={"command": command, "seconds": run.seconds()}), evaluated, golden)
    for of_arm in indexes.values():
        freshness.remove_copy(of_arm)
    return ComparisonResult(run.url)


def _identity(
    settings: config.Config, evaluated: str, golden: Mapping[str, str], searched: comparison.VariantSearch | None
) -> dict[str, Any]:
    of_arms = [settings.with_values({"answer.arm": arm}) for arm in settings.compare.arms if config.retrieves(arm)]
    return {
        **({"variants": searched.model_dump(mode="json")} if searched else {}),
        "format": comparison.FORMAT,
        "evaluated": artifacts.read_manifest(evaluated)["manifest_sha256"],
        "golden": {name: artifacts.read_manifest(run)["manifest_sha256"] for name, run in golden.items()},
        "compare": _set_values(settings.compare, {"hosted", "variants"}),
        "calibrations": [
            dataclasses.asdict(calibrated) for of_arm in of_arms if (calibrated := adaptive.read_calibration(of_arm))
        ],
        "files": _fingerprints(settings),
        "prices": _set_values(settings.prices, {"million_prompt_tokens", "million_completion_tokens"}),
        "evaluate": settings.evaluate.identity(exclude={"arms"}),
    }


def _set_values(section: config.Section, optional: set[str]) -> dict[str, Any]:
    """The values of a section, without these fields where they are not set: comparisons made before they existed stay valid."""
    return section.model_dump(mode="json", exclude={name for name in optional if not getattr(section, name)})


def _require_inputs(settings: config.Config) -> None:
    """Refuse unreadable inputs before hours of training."""
    evaluate.require_index(settings, settings.compare.arms)
    evaluate.require_judged(settings, staged_queries.judged_queries(settings))
    _fingerprints(settings)


def _indexes(settings: config.Config) -> dict[str, config.Config]:
    """Workspace -> the config of an arm that searches its index; a mode that tuned the encoder has its own index."""
    configs = (
        arms_module.with_tuned_models(settings.with_values({"answer.arm": arm})) for arm in settings.compare.arms
    )
    return {of_arm.workspace: of_arm for of_arm in configs}


def _fingerprints(settings: config.Config) -> list[Any]:
    """Fingerprints of the files named in the section `compare`: if one changes, the arms are compared again."""
    rule = settings.compare
    paths = [path for path in (rule.changed_queries_path, rule.probe_path) if path]
    found: list[Any] = [
        staged_queries.fingerprint(staged_queries.with_all_queries_of(settings, path)) for path in paths
    ]
    if rule.changes_path:
        files = input_units.plan_units(rule.changes_path, settings.corpus.unit_bytes).files
        found += [[file.path, file.sha256] for file in files]
    return found


def read_comparison(url: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a finished comparison's `comparison.json`."""
    path = artifacts.open_artifact(os.fspath(url), "compare").path
    found: dict[str, Any] = json.loads((path / "comparison.json").read_text(encoding="utf-8"))
    return found


def _publish(run: runs.Run, found: Comparison, evaluated: str, golden: Mapping[str, str]) -> None:
    staging = artifacts.stage(run.url)
    content = found.content()
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (staging / "comparison.json").write_text(text, encoding="utf-8")
    (staging / "report.html").write_text(html_page.render(content), encoding="utf-8")
    verdict = {name: content["verdict"][name] for name in ("outcome", "arm", "headline")}
    run.publish(staging, {"evaluated": evaluated, "golden": dict(golden), "verdict": verdict, "seconds": found.seconds})


def _train_if_missing(settings: config.Config, arm: config.Arm) -> None:
    """Train the model of a tuned arm if there is none; otherwise check that the existing one may be compared."""
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


def _has_gold_passage(query: schema.Query) -> bool:
    return bool(query.answers and splits.positives(query))


def _gold_runs(settings: config.Config, queries: Sequence[schema.Query]) -> dict[str, str]:
    """Arm that retrieves -> the run in which its generator answers from the gold passage."""
    # Queries without a gold passage fail and are left out, so the result means little if they are the majority.
    if not settings.compare.gold_passages or sum(map(_has_gold_passage, queries)) < len(queries) / 2:
        return {}
    arms = [arm for arm in settings.compare.arms if config.retrieves(arm)]
    values = {"answer.gold_passage": True, "answer.max_failed_share": 1}
    return {arm: str(answer.answer(settings.with_values({"answer.arm": arm, **values}))) for arm in arms}


def _retrieval(settings: config.Config, queries: Sequence[schema.Query]) -> comparison.Metrics | None:
    """Metrics of retrieval; None if no arm retrieves or no query has qrels."""
    if not any(map(config.retrieves, settings.compare.arms)) or not any(map(splits.positives, queries)):
        return None
    run = artifacts.open_artifact(str(retrieve.retrieve(settings)), "retrieve").path
    found: dict[str, dict[str, Any]] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {metric: intervals.Interval(**ends) for metric, ends in found.items()}


def _ceilings(
    settings: config.Config,
    measured: Mapping[config.Arm, measure.Measured],
    golden: Mapping[str, str],
    queries: Sequence[schema.Query],
) -> dict[str, Ceilings]:
    """Each generator's scores without passages, with retrieved and with gold passages, over queries with a gold passage."""
    answered = {arm: evaluate.read_answers(run) for arm, run in golden.items()}
    failed = {row.query_id for rows in answered.values() for row in rows if row.status == "failed"}
    readable = {query.query_id for query in queries if _has_gold_passage(query)} - failed
    hosted = [(name, f"base@{name}", f"rag@{name}") for name in settings.compare.hosted]
    generators = [("base model", "base", "rag"), *hosted, ("tuned model", "ft", "rag+ft")]
    found = {}
    for name, closed, opened in generators:
        scores = {
            "closed_book": measured[closed].scores if closed in measured else {},
            "retrieved": measured[opened].scores if opened in measured else {},
            "gold_passage": evaluate.scores_of(queries, answered[opened], settings) if opened in answered else {},
        }
        shared = {
            kind: {query_id: values for query_id, values in per_query.items() if query_id in readable}
            for kind, per_query in scores.items()
        }
        metric = settings.compare.metric
        means = {kind: intervals.mean_of(per_query, metric, settings) for kind, per_query in shared.items()}
        found[name] = Ceilings(**{kind: mean for kind, mean in means.items() if mean is not None})
    return {name: ceilings for name, ceilings in found.items() if ceilings.model_fields_set}


def _comparison(
    settings: config.Config,
    measured: Mapping[config.Arm, measure.Measured],
    queries: Sequence[schema.Query],
    retrieval: comparison.Metrics | None,
    ceilings: dict[str, Ceilings],
) -> Comparison:
    compared = decision.differences({arm: each.scores for arm, each in measured.items()}, settings)
    verdict = decision.decide({arm: each.evidence() for arm, each in measured.items()}, compared, settings)
    return Comparison(
        format=comparison.FORMAT,
        title=settings.queries.path,
        verdict=dataclasses.replace(
            verdict, warnings=(*verdict.warnings, *measure.cost_warnings(measured), *measure.cut_warnings(measured))
        ),
        metric=settings.compare.metric,
        margin=settings.compare.margin,
        confidence=settings.evaluate.confidence,
        questions=comparison.Questions(
            total=len(queries),
            answerable=sum(bool(query.answers) for query in queries),
            unanswerable=sum(query.answers == () for query in queries),
            needed=max((each.needed or 0 for each in verdict.differences), default=0) or None,
        ),
        arms={arm: _arm(arm, each, settings, queries, verdict.violations[arm]) for arm, each in measured.items()},
        ceilings=ceilings,
        differences=verdict.differences,
        retrieval=retrieval,
        break_even=_break_even({arm: each.cost for arm, each in measured.items()}),
        examples=_examples(settings, measured, queries),
        config=settings.model_dump(mode="json"),
        versions={"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES},
        hardware=_hardware(),
        created=dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _arm(
    arm: config.Arm,
    measured: measure.Measured,
    settings: config.Config,
    queries: Sequence[schema.Query],
    violations: Sequence[str],
) -> ArmResult:
    summary, explained = measured.summary, {"citation_precision", "citation_recall"}
    # The shares of abstained and failed rows are left out: abstention quality and the statuses tell more.
    elsewhere = explained | {"abstained", "failed"}
    latency, visible = measured.latency, measured.visible_seconds
    return ArmResult(
        model=measured.settings.generator.model.removeprefix(filesystem.join(settings.workspace, "")),
        model_fingerprint=measured.manifest["model"],
        index_version=measured.manifest["index_version"],
        statuses={"ok": 0, "failed": 0, **measured.manifest["statuses"]},
        cut=measured.manifest.get("num_cut", 0),
        quality={name: each for name, each in summary.items() if name not in elsewhere},
        explainability={"cited_share": measured.cited}
        | {name: summary[name] for name in sorted(explained & summary.keys())},
        latency=latency if config.retrieves(arm) else latency.model_copy(update={"retrieval": None}),
        throughput=comparison.Throughput(answers_per_second=measured.manifest["queries_per_second"]),
        cost=measured.cost,
        freshness=comparison.Freshness(
            visible_seconds=visible if math.isfinite(visible) else None, changed=measured.changed
        ),
        forgetting=measured.forgetting,
        adaptive=measured.adaptive,
        losses=failures.count_outcomes(
            [query for query in queries if query.answers], measured.rows, measured.scores, settings.compare.metric, arm
        ),
        violations=tuple(violations),
        rounds=measured.rounds,
    )


def _break_even(found: Mapping[str, costs.Cost]) -> tuple[BreakEven, ...]:
    """The pairs of arms of which one costs more to set up and less per answer."""
    return tuple(
        BreakEven(arm=arm, against=other, answers=number)
        for arm, cost in found.items()
        for other, against in found.items()
        if (number := costs.break_even(cost, against)) is not None
    )


def _examples(
    settings: config.Config, measured: Mapping[config.Arm, measure.Measured], queries: Sequence[schema.Query]
) -> tuple[comparison.Example, ...]:
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

    def answers(query_id: str) -> dict[str, comparison.ExampleAnswer]:
        rows = {arm: (each, each.rows[query_id]) for arm, each in measured.items()}
        return {
            arm: examples.shown_answer(row, each.scores[query_id][metric], passages(each, row))
            for arm, (each, row) in rows.items()
        }

    return tuple(
        comparison.Example(
            query_id=query_id,
            query=by_id[query_id].text,
            gold=tuple(by_id[query_id].answers or ()),
            answers=answers(query_id),
        )
        for query_id in examples.most_telling(scores, metric, settings.compare.num_examples)
    )


def _hardware() -> dict[str, Any]:
    """The machine that ran the driver."""
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
