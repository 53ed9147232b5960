"""Puts what was measured of all arms into a `Comparison`, the content of `comparison.json`."""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ragtune_ray import config, schema
from ragtune_ray.cluster.answering import evaluate
from ragtune_ray.cluster.comparing import measure
from ragtune_ray.evaluation import comparison, costs, decision, failures, intervals, scoring
from ragtune_ray.evaluation.comparison import ArmResult, BreakEven, Ceilings, Comparison
from ragtune_ray.evaluation.labelling import checking, labels
from ragtune_ray.evaluation.report import examples
from ragtune_ray.evaluation.verdict import Verdict
from ragtune_ray.index import contents
from ragtune_ray.ingest import splits
from ragtune_ray.storage import filesystem

MOST_CONTESTED, CONTESTED_QUESTIONS = 3, 3
"""Metrics that disagree with the verdict, and questions of each, that the report shows."""
LIBRARIES = ("ragtune-ray", "ray", "torch", "transformers", "sentence-transformers", "faiss-cpu", "pyarrow")


def has_gold_passage(query: schema.Query) -> bool:
    """Whether the passage that contains the answer can be shown."""
    return bool(query.answers and splits.positives(query))


def reads_gold(settings: config.Config, queries: Sequence[schema.Query]) -> bool:
    """Whether generators also answer from gold passages: they are shown for half of the queries or more.

    Queries without a gold passage are left out, so the result would mean little if they were the majority.
    """
    return settings.compare.gold_passages and sum(map(has_gold_passage, queries)) >= len(queries) / 2


def ceilings(
    settings: config.Config,
    measured: Mapping[config.Arm, measure.Measured],
    golden: Mapping[str, str],
    queries: Sequence[schema.Query],
) -> dict[str, Ceilings]:
    """Each generator's scores without passages, with retrieved and with gold passages, over queries with a gold passage."""
    failed = {row.query_id for run in golden.values() for row in evaluate.read_answers(run) if row.status == "failed"}
    # Others were shown no passage, so nothing tells whether an answer without a gold answer is right.
    readable = [query for query in queries if has_gold_passage(query) and query.query_id not in failed]
    names = {query.query_id for query in readable}
    hosted = [(name, f"base@{name}", f"rag@{name}") for name in settings.compare.hosted]
    generators = [("base model", "base", "rag"), *hosted, ("tuned model", "ft", "rag+ft")]
    found = {}
    for name, closed, opened in generators:
        scores = {
            "closed_book": measured[closed].scores if closed in measured else {},
            "retrieved": measured[opened].scores if opened in measured else {},
            "gold_passage": evaluate.scores_of(readable, golden[opened], settings) if opened in golden else {},
        }
        shared = {
            kind: {query_id: values for query_id, values in per_query.items() if query_id in names}
            for kind, per_query in scores.items()
        }
        metric = settings.compare.metric
        means = {kind: intervals.mean_of(per_query, metric, settings) for kind, per_query in shared.items()}
        found[name] = Ceilings(**{kind: mean for kind, mean in means.items() if mean is not None})
    return {name: ceilings for name, ceilings in found.items() if ceilings.model_fields_set}


def comparison_of(
    settings: config.Config,
    measured: Mapping[config.Arm, measure.Measured],
    queries: Sequence[schema.Query],
    retrieval: comparison.Metrics | None,
    ceilings: dict[str, Ceilings],
    looked: comparison.Looks | None,
    given: labels.Labels,
) -> Comparison:
    """Decide, and put all measurements beside the verdict.

    Args:
        settings: of the comparison.
        measured: arm -> its measurements.
        queries: that any arm was asked.
        retrieval: metrics of the hits; None if no arm retrieves.
        ceilings: from `ceilings`.
        looked: how many questions were asked, if asking stopped with the verdict.
        given: people's labels.
    """
    checked, labelled = checking.check(
        {arm: each.scores for arm, each in measured.items()},
        {arm: labels.keys(each.rows.values()) for arm, each in measured.items()},
        given,
        settings,
    )
    if labelled:
        measured = {arm: each.corrected(labelled[arm], settings) for arm, each in measured.items()}
    verdict = _verdict(settings, measured, queries, looked, checked)
    return Comparison(
        format=comparison.FORMAT,
        title=settings.queries.path,
        verdict=verdict,
        metric=settings.compare.metric,
        margin=settings.compare.margin,
        confidence=settings.evaluate.confidence,
        questions=_questions(queries, verdict),
        arms={arm: _arm(arm, each, settings, queries, verdict.violations[arm]) for arm, each in measured.items()},
        ceilings=ceilings,
        differences=verdict.differences,
        retrieval=retrieval,
        looks=looked,
        checked=checked,
        break_even=_break_even({arm: each.cost for arm, each in measured.items()}),
        examples=_examples(settings, measured, queries),
        contested=_contested(settings, measured, queries, verdict),
        config=settings.model_dump(mode="json"),
        versions={"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES},
        hardware=_hardware(),
        created=dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _questions(queries: Sequence[schema.Query], verdict: Verdict) -> comparison.Questions:
    return comparison.Questions(
        total=len(queries),
        answerable=sum(bool(query.answers) for query in queries),
        unanswerable=sum(query.answers == () for query in queries),
        needed=max((each.needed or 0 for each in verdict.differences), default=0) or None,
    )


def _verdict(
    settings: config.Config,
    measured: Mapping[config.Arm, measure.Measured],
    queries: Sequence[schema.Query],
    looked: comparison.Looks | None,
    checked: comparison.Checked | None,
) -> Verdict:
    """The decision, with what the reader must know about the labels, the looks, the costs, cut answers and languages."""
    rows = {arm: each.rows.values() for arm, each in measured.items()}
    evidence = {arm: each.evidence() for arm, each in measured.items()}
    labelled = {arm: each.labels for arm, each in evidence.items() if each.labels is not None}
    scores = {arm: each.scores for arm, each in measured.items()}
    verdict = decision.decide(
        evidence,
        decision.differences(scores, settings, labelled or None),
        settings,
        any_time=looked is not None,
        dropped=looked.dropped if looked else (),
    )
    return dataclasses.replace(
        verdict,
        reason=(
            *verdict.reason,
            *(checking.reasons(checked) if checked else ()),
            *([looked.sentence()] if looked else ()),
        ),
        warnings=(
            *verdict.warnings,
            *measure.grade_warnings(settings, measured),
            *checking.warnings(checked, settings),
            *measure.cost_warnings(measured),
            *measure.cut_warnings(measured),
            *scoring.language_warnings(queries, rows, settings.evaluate.language),
        ),
    )


def _arm(
    arm: config.Arm,
    measured: measure.Measured,
    settings: config.Config,
    queries: Sequence[schema.Query],
    violations: Sequence[str],
) -> ArmResult:
    summary = measured.summary
    explained = {f"citation_{name}" for name in ("precision", "recall", "support_precision", "support_recall")}
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
            [query for query in queries if query.answers and query.query_id in measured.rows],
            measured.rows,
            measured.scores,
            settings.compare.metric,
            arm,
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
    shared = set.intersection(*(set(each.scores) for each in measured.values()))
    scores = {arm: {name: row for name, row in each.scores.items() if name in shared} for arm, each in measured.items()}

    def passages(of_arm: measure.Measured, row: schema.Answer) -> dict[str, schema.Passage]:
        if not row.passage_ids:
            return {}
        version = of_arm.manifest["index_version"]
        return contents.passages_by_id(of_arm.settings.workspace, row.passage_ids, version)

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
            gold=by_id[query_id].answers,
            answers=answers(query_id),
        )
        for query_id in examples.most_telling(scores, metric, settings.compare.num_examples)
    )


def _contested(
    settings: config.Config,
    measured: Mapping[config.Arm, measure.Measured],
    queries: Sequence[schema.Query],
    verdict: Verdict,
) -> tuple[comparison.Contested, ...]:
    """The metrics that see another arm ahead, with questions that show it."""
    metric, by_id = settings.compare.metric, {query.query_id: query for query in queries}
    scores = {arm: each.scores for arm, each in measured.items()}

    def question(query_id: str, other: str, arms: tuple[str, str]) -> comparison.ContestedQuestion:
        return comparison.ContestedQuestion(
            query_id=query_id,
            query=by_id[query_id].text,
            gold=by_id[query_id].answers,
            answers={
                arm: comparison.ContestedAnswer(
                    text=measured[arm].rows[query_id].answer,
                    score=scores[arm][query_id][metric],
                    other=scores[arm][query_id][other],
                )
                for arm in arms
            },
        )

    found = []
    for each in verdict.disagreements[:MOST_CONTESTED]:
        arms = (each.arm, verdict.arm)
        ids = examples.most_contested(scores, (metric, each.metric), arms, CONTESTED_QUESTIONS)
        found.append(
            comparison.Contested(
                metric=each.metric,
                arm=each.arm,
                score=each.score,
                against=verdict.arm,
                against_score=each.against,
                low=each.low,
                high=each.high,
                n=each.n,
                questions=tuple(question(query_id, each.metric, arms) for query_id in ids),
            )
        )
    return tuple(found)


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
