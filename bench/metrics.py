"""How well each metric agrees with the right grade of planted answers.

    python -m bench.metrics [--metrics semantic ...] [section.field=value ...]

`bench/graded_answers.jsonl` has 32 questions of general knowledge in 12 domains: 16 with a gold answer of a sentence and nine
planted answers each, 16 with a number as gold answer and two. The grade follows from the kind of answer (`GRADES`): right 1,
partly 0.5, wrong 0. Printed per metric: the mean score of each kind; the AUC, which is the chance that a right answer scores
higher than a wrong one (ties count half; 0.5 is a coin); and Kendall's tau-b with the grade. EM, token F1, contains-answer,
ROUGE-L and numeric_match are always computed; `--metrics` names those of `evaluate.metrics` to compute besides (default:
semantic, with the embedded encoder).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from scipy import stats

from ragtune_ray import config, schema
from ragtune_ray.answering.abstention import is_abstention
from ragtune_ray.evaluation import scoring
from ragtune_ray.evaluation.grading import graders
from ragtune_ray.evaluation.grading.task import Grade, Task

CASES = Path(__file__).with_name("graded_answers.jsonl")
GRADES = {
    "same_words": 1.0,
    "paraphrase": 1.0,
    "longer": 1.0,
    "other_language": 1.0,
    "number_other_form": 1.0,
    "half_right": 0.5,
    "wrong_fact": 0.0,
    "negation": 0.0,
    "wrong_number": 0.0,
    "off_topic": 0.0,
    "empty": 0.0,
}
"""Kind of answer -> its grade. `longer` is the gold answer among other true sentences; `other_language` says the same."""
PASSAGE = "gold"
COMPUTED = ("EM", "token_F1", "ROUGE_L", "contains_answer", "numeric_match")


@dataclass(frozen=True, slots=True)
class Case:
    """One planted answer."""

    kind: str
    query: schema.Query
    answer: schema.Answer


def read_cases() -> list[Case]:
    """The planted answers."""
    cases: list[Case] = []
    for line in CASES.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for kind, text in row["answers"].items():
            query = schema.Query(f"q{len(cases)}", row["query"], (row["gold"],), (), (), "all")
            cases.append(Case(kind, query, _answer(query, text)))
    return cases


def _answer(query: schema.Query, text: str) -> schema.Answer:
    return schema.Answer(
        query_id=query.query_id, query=query.text, answer=text, citations=(), passage_ids=(PASSAGE,), scores=(),
        abstained=is_abstention(text), seconds=0.0, prompt_tokens=0, completion_tokens=0, status="ok", error="",
        index_version="", model="",
    )  # fmt: skip


def scores_of(cases: Sequence[Case], settings: config.Config, graded: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metric -> query id -> score, of every metric that needs no model and of those in `graded`."""
    found = scoring.score_answers([case.query for case in cases], [case.answer for case in cases], settings.evaluate)
    scores = {metric: {name: row[metric] for name, row in found.items() if metric in row} for metric in COMPUTED}
    return scores | {
        metric: _grades(cases, settings, metric) for metric in get_args(config.GradedMetric) if metric in graded
    }


def _grades(cases: Sequence[Case], settings: config.Config, metric: config.GradedMetric) -> dict[str, float]:
    """The grades that a model gives; where passages are read, the gold answer is the only one."""
    found = {
        case.query.query_id: graders.task_of(
            metric, case.query, case.answer, {PASSAGE: (case.query.answers or ("",))[0]}, ()
        )
        for case in cases
    }
    tasks = {name: task for name, task in found.items() if isinstance(task, Task)}
    grades = dict(zip(tasks, graders.open_grader(settings, metric).grade(list(tasks.values())), strict=True))
    grades |= {name: grade for name, grade in found.items() if isinstance(grade, Grade)}
    return {name: grade.values[metric] for name, grade in grades.items() if metric in grade.values}


def agreement(cases: Sequence[Case], scores: Mapping[str, float]) -> tuple[float, float]:
    """The AUC of right against wrong answers, and Kendall's tau-b with the grade, over the answers that have a score."""
    pairs = [(GRADES[case.kind], scores[case.query.query_id]) for case in cases if case.query.query_id in scores]
    grades, values = np.array(pairs).T
    right, wrong = values[grades == 1], values[grades == 0]
    auc = stats.mannwhitneyu(right, wrong).statistic / (len(right) * len(wrong))
    return float(auc), float(stats.kendalltau(grades, values).statistic)


def main() -> None:
    """Print one row per metric as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", nargs="*", default=["semantic"], choices=get_args(config.GradedMetric))
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    chosen = parser.parse_args()
    cases, settings = read_cases(), config.Config().using(*chosen.overrides)
    print(f"{len(cases)} planted answers to {len({case.query.text for case in cases})} questions\n")
    print(f"| metric | {' | '.join(kind.replace('_', ' ') for kind in GRADES)} | AUC | tau |")
    print(f"| right grade | {' | '.join(f'{grade:g}' for grade in GRADES.values())} | 1 | 1 |")
    for metric, scores in scores_of(cases, settings, chosen.metrics).items():
        means = []
        for kind in GRADES:
            values = [
                scores[case.query.query_id] for case in cases if case.kind == kind and case.query.query_id in scores
            ]
            means.append(f"{np.mean(values):.2f}" if values else "-")
        auc, tau = agreement(cases, scores)
        print(f"| `{metric}` | {' | '.join(means)} | {auc:.2f} | {tau:.2f} |")


if __name__ == "__main__":
    main()
