"""Prints which arm each metric would recommend, from the answers of `bench.planted` with long answers; nothing is answered again.

    python -m bench.planted_metrics [--workspace DIRECTORY] [--margin 0.1]

Each task is weighed twice: with all wordings of its gold answers, and with one only that no training answer has. Costs are from
the finished comparison.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.planted_world import Row
from ragtune_ray import config
from ragtune_ray.cluster.answering.evaluate import read_answers
from ragtune_ray.evaluation.grading.semantic import SemanticGrader
from ragtune_ray.evaluation.grading.task import Task
from ragtune_ray.evaluation.metrics.answers import contains_answer, exact_match, rouge_l, token_f1
from ragtune_ray.evaluation.significance import difference_ends
from ragtune_ray.models.encoder import load_encoder

WITHOUT_MODEL = {
    "EM": exact_match,
    "token_F1": token_f1,
    "ROUGE_L": rouge_l,
    "contains_answer": contains_answer,
}
CONFIDENCE = 0.95
Scores = Mapping[str, np.ndarray]
"""Arm -> score of each question."""


def scores_by_metric(
    answers: Mapping[str, Sequence[str]], golds: Sequence[Sequence[str]], grader: SemanticGrader
) -> dict[str, Scores]:
    """Metric -> arm -> scores of the answers, one per question."""
    found: dict[str, Scores] = {
        name: {
            arm: np.array([score(text, gold, "en") for text, gold in zip(texts, golds, strict=True)])
            for arm, texts in answers.items()
        }
        for name, score in WITHOUT_MODEL.items()
    }
    found["semantic"] = {arm: _cosines(texts, golds, grader) for arm, texts in answers.items()}
    return found


def _cosines(texts: Sequence[str], golds: Sequence[Sequence[str]], grader: SemanticGrader) -> np.ndarray:
    tasks = [Task("", tuple(gold), text) for text, gold in zip(texts, golds, strict=True)]
    return np.array([grade.values["semantic"] for grade in grader.grade(tasks)])


def recommended(scores: Scores, by_cost: Sequence[str], margin: float) -> str:
    """The cheapest arm of which cheaper ones are shown to be worse and dearer ones no better by more than the margin."""
    for place, arm in enumerate(by_cost):
        highs = {other: _high(scores[other] - scores[arm]) for other in by_cost if other != arm}
        if all(high < 0 if by_cost.index(other) < place else high <= margin for other, high in highs.items()):
            return arm
    return "too few"


def _high(moved: np.ndarray) -> float:
    return difference_ends(float(moved.mean()), float(moved.std(ddof=1)), len(moved), CONFIDENCE)[1]


def main() -> None:
    """Print a line per task, wordings and metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=Path("workspace/planted"))
    parser.add_argument("--margin", type=float, default=0.1)
    options = parser.parse_args()
    grader = SemanticGrader(load_encoder(config.Config().encoder))
    for path in sorted(options.workspace.glob("long_*/runs/compare-*/comparison.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        folder = path.parents[2]
        by_cost = sorted(found["arms"], key=lambda arm: found["arms"][arm]["cost"]["total"])
        golds = {row["query_id"]: row["answers"] for row in _rows(folder / "queries.jsonl") if row["split"] == "test"}
        runs = json.loads((Path(_evaluated(path)) / "manifest.json").read_text(encoding="utf-8"))["runs"]
        answers = {arm: {row.query_id: row.answer for row in read_answers(run)} for arm, run in runs.items()}
        texts = {arm: [rows[query_id] for query_id in golds] for arm, rows in answers.items()}
        for wordings, picked in (("all", list(golds.values())), ("one", [gold[-1:] for gold in golds.values()])):
            for metric, scores in scores_by_metric(texts, picked, grader).items():
                means = " ".join(f"{arm} {scores[arm].mean():.2f}" for arm in found["arms"])
                print(
                    f"{folder.name:<28} {wordings:<4} {metric:<16} {recommended(scores, by_cost, options.margin):<8} {means}"
                )


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _evaluated(path: Path) -> str:
    return str(json.loads((path.parent / "manifest.json").read_text(encoding="utf-8"))["evaluated"])


if __name__ == "__main__":
    main()
