"""`ragtune compare`: runs the arms on the same held-out questions and recommends one.

In: a config with an index and queries that have gold answers. Out: `runs/compare-ID/` with `comparison.json` and `report.html`.
Missing tuned models are trained first. A killed comparison resumes where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import pyarrow as pa

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import runs, session, staged_queries
from ragtune_ray.cluster.answering import answer, evaluate, retrieve
from ragtune_ray.cluster.comparing import check, forecast, freshness, looks, measure, summary, variants
from ragtune_ray.cluster.training import train
from ragtune_ray.cluster.tuning import tune
from ragtune_ray.evaluation import adaptive, comparison, intervals
from ragtune_ray.evaluation.comparison import Comparison
from ragtune_ray.evaluation.grading import graders
from ragtune_ray.evaluation.labelling import labels
from ragtune_ray.evaluation.report import html_page
from ragtune_ray.evaluation.verdict import Evidence
from ragtune_ray.ingest import input_units, splits
from ragtune_ray.models import arms as arms_module
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts
from ragtune_ray.storage.results import Result


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

    If an arm is tuned or uses a model trained on these queries, `queries.split=all` means the test split.

    Raises:
        EvaluationError: no query can be scored, or a tuned model was trained on other splits or from another base model.
        LeakError: an arm is tuned, and questions of two splits are about the same document.
        AnswerError: too many rows of an arm failed.
        GradingError: `compare.metric` needs a model that is not named, or too many grades failed.
        ArtifactError: an arm retrieves, and there is no sound index.
    """
    started = time.monotonic()
    arms = settings.compare.arms
    settings = given = variants.held_out(evaluate.held_out(settings.with_compared_metric(), arms))
    _require_inputs(settings)
    evaluate.check_used_models(settings, arms)
    checked = check.say(settings)
    if checked.facts["leak"] and any(map(config.is_tuned, arms)):
        raise splits.LeakError(checked.facts["leak"])
    stages = progress.Stages("compare", checked.seconds())
    people = labels.read(labels.path_of(settings))
    with session.ray_session(settings.cluster, for_training=any(map(config.is_tuned, arms))):
        if variants.are_searched(settings):
            stages.begin(forecast.CHOOSE)
        settings, searched = variants.settle(settings)
        for arm in arms:
            _train_if_missing(settings, arm, stages)
        once = _MeasuredOnce()
        settings, evaluated, looked = _asked(settings, once, stages)
        asked = max((runs.read_manifest(run)["input"] for run in evaluated.values()), key=itemgetter("num_queries"))
        queries = staged_queries.judged_queries(settings, asked["fingerprint"])
        golden = _gold_runs(settings, queries, stages)
        stages.begin(forecast.MEASURE)
        retrieval = _retrieval(settings, queries)
        run = runs.Run.of(given, "compare", _identity(settings, evaluated, golden, searched, people), started=started)
        if run.is_finished():
            once.remove_copies()
            return ComparisonResult(run.url)
        changed = once.changes(settings)
        measured = {
            arm: measure.measure(settings, arm, evaluated[arm], queries, changed, one_by_one)
            for arm, one_by_one in once.latencies(settings, evaluated, queries).items()
        }
        ceilings = summary.ceilings(settings, measured, golden, queries)
        found = summary.comparison_of(settings, measured, queries, retrieval, ceilings, looked, people)
        if searched:
            found = found.model_copy(update={"variants": searched})
    _publish(run, found.model_copy(update={"command": command, "seconds": run.seconds()}), evaluated, golden)
    once.remove_copies()
    return ComparisonResult(run.url)


class _MeasuredOnce:
    """Measurements that do not depend on how many questions are asked."""

    def __init__(self) -> None:
        self.indexes: dict[str, config.Config] = {}
        self._latencies: dict[config.Arm, comparison.Latency] = {}
        self._changes: dict[str, tuple[config.Config, float]] = {}

    def latencies(
        self, settings: config.Config, evaluated: Mapping[config.Arm, str], queries: Sequence[schema.Query]
    ) -> dict[config.Arm, comparison.Latency]:
        """Arm -> how long one question takes."""
        if not self._latencies:
            self._latencies = measure.measure_latencies(settings, evaluated, queries)
        return self._latencies

    def changes(self, settings: config.Config) -> dict[str, tuple[config.Config, float]]:
        """Workspace of an index -> what `freshness.follow_changes` returns; empty if no change is measured."""
        if settings.compare.changed_queries_path and not self.indexes:
            self.indexes = _indexes(settings)
            self._changes = {workspace: freshness.follow_changes(of_arm) for workspace, of_arm in self.indexes.items()}
        return self._changes

    def remove_copies(self) -> None:
        """Remove the copies of indexes to which the changes were applied."""
        for of_arm in self.indexes.values():
            freshness.remove_copy(of_arm)


def _asked(
    settings: config.Config, once: _MeasuredOnce, stages: progress.Stages
) -> tuple[config.Config, dict[config.Arm, str], comparison.Looks | None]:
    """Let the arms answer; returns the config of the questions asked, each arm's run of `evaluate`, and the looks."""
    compared = settings.compare.arms
    if settings.compare.until == "all":
        given = settings.with_values({"evaluate.arms": compared})
        run = str(evaluate.evaluate(given, begin=lambda arm: stages.begin(forecast.answer_stage(arm))))
        return settings, dict.fromkeys(compared, run), None
    stages.begin(forecast.DECIDE)

    def weigh(so_far: config.Config, evaluated: Mapping[config.Arm, str]) -> dict[config.Arm, Evidence]:
        queries = staged_queries.judged_queries(so_far)
        latencies, changed = once.latencies(so_far, evaluated, queries), once.changes(so_far)
        return {
            arm: measure.evidence_so_far(so_far, arm, run, changed, latencies[arm]) for arm, run in evaluated.items()
        }

    asked = looks.ask_until_decided(settings, weigh)
    return asked.settings, asked.evaluated, asked.looks


def _identity(
    settings: config.Config,
    evaluated: Mapping[config.Arm, str],
    golden: Mapping[str, str],
    searched: comparison.VariantSearch | None,
    people: labels.Labels,
) -> dict[str, Any]:
    of_arms = [settings.with_values({"answer.arm": arm}) for arm in settings.compare.arms if config.retrieves(arm)]
    return {
        **({"variants": searched.model_dump(mode="json")} if searched else {}),
        **({"labels": people.identity()} if people.rows else {}),
        "format": comparison.FORMAT,
        "evaluated": looks.identity(evaluated),
        "golden": {name: artifacts.read_manifest(run)["manifest_sha256"] for name, run in golden.items()},
        "compare": _compare_identity(settings.compare),
        "calibrations": [
            dataclasses.asdict(calibrated) for of_arm in of_arms if (calibrated := adaptive.read_calibration(of_arm))
        ],
        "files": _fingerprints(settings),
        "prices": _set_values(settings.prices, {"million_prompt_tokens", "million_completion_tokens"}),
        "evaluate": settings.evaluate.identity(exclude={"arms"}),
    }


def _compare_identity(rule: config.Compare) -> dict[str, Any]:
    values = _set_values(rule, {"hosted", "variants", "cost_margin"})
    return {name: value for name, value in values.items() if (name, value) != ("until", "all")}


def _set_values(section: config.Section, optional: set[str]) -> dict[str, Any]:
    """The values of a section, without these fields where they are not set: comparisons made before they existed stay valid."""
    return section.model_dump(mode="json", exclude={name for name in optional if not getattr(section, name)})


def _require_inputs(settings: config.Config) -> None:
    """Refuse unreadable inputs, and metrics without their model, before hours of training."""
    graders.require_models(settings)
    evaluate.require_index(settings, settings.compare.arms)
    judged = staged_queries.judged_queries(settings)
    evaluate.require_judged(settings, judged)
    evaluate.compared(settings, judged)
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
        files = input_units.plan_units(rule.changes_path, fingerprint="sha256").files
        found += [[file.path, file.identity] for file in files]
    return found


def read_comparison(url: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a finished comparison's `comparison.json`."""
    path = artifacts.open_artifact(os.fspath(url), "compare").path
    found: dict[str, Any] = json.loads((path / "comparison.json").read_text(encoding="utf-8"))
    return found


def _publish(run: runs.Run, found: Comparison, evaluated: Mapping[config.Arm, str], golden: Mapping[str, str]) -> None:
    staging = artifacts.stage(run.url)
    content = found.content()
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (staging / "comparison.json").write_text(text, encoding="utf-8")
    (staging / "report.html").write_text(html_page.render(content), encoding="utf-8")
    verdict = {name: content["verdict"][name] for name in ("outcome", "arm", "headline")}
    # Arms that were dropped early have other runs of `evaluate`; this one has the arm that the verdict names.
    of_verdict = evaluated.get(found.verdict.arm) or next(iter(evaluated.values()))
    run.publish(
        staging, {"evaluated": of_verdict, "golden": dict(golden), "verdict": verdict, "seconds": found.seconds}
    )


def _train_if_missing(settings: config.Config, arm: config.Arm, stages: progress.Stages) -> None:
    """Train the model of a tuned arm if there is none; otherwise check that the existing one may be compared."""
    if not config.is_tuned(arm):
        return
    try:
        arms_module.tuned_model(settings.workspace, arm)
    except weights.ModelError:
        stages.begin(forecast.train_stage(arm))
        if config.is_mode(arm):
            tune.tune(settings.with_values({"tune.mode": arm}))
        else:
            train.train(settings.with_values({"training.objective": "sft", "training.arm": arm, "training.name": ""}))
        return
    evaluate.check_tuned(settings, arm)


def _gold_runs(
    settings: config.Config, queries: Sequence[schema.Query], stages: progress.Stages
) -> dict[config.Arm, str]:
    """Arm that retrieves -> the run in which its generator answers from the gold passage."""
    golden = {}
    for arm in filter(config.retrieves, settings.compare.arms if summary.reads_gold(settings, queries) else ()):
        stages.begin(forecast.gold_stage(arm))
        values = {"answer.arm": arm, "answer.gold_passage": True, "answer.max_failed_share": 1}
        golden[arm] = str(answer.answer(settings.with_values(values)))
    return golden


def _retrieval(settings: config.Config, queries: Sequence[schema.Query]) -> comparison.Metrics | None:
    """Metrics of retrieval; None if no arm retrieves or no query has qrels."""
    if not any(map(config.retrieves, settings.compare.arms)) or not any(map(splits.positives, queries)):
        return None
    run = artifacts.open_artifact(str(retrieve.retrieve(settings)), "retrieve").path
    found: dict[str, dict[str, Any]] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {metric: intervals.Interval(**ends) for metric, ends in found.items()}
