"""A grade that failed is asked for again by the next `evaluate`, although the run before ended well; no Ray is started here."""

import json
from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.cluster import staged_queries
from ragtune_ray.cluster.answering import evaluate
from ragtune_ray.cluster.grading import workers
from ragtune_ray.evaluation.grading.task import Grade, GradingError, Task
from ragtune_ray.storage import artifacts
from tests.support.answered import grade_in_this_process, publish_answers
from tests.support.comparisons import answer_row

COUNT = 20


class Judge:
    """Grades every answer but the hard ones."""

    def __init__(self) -> None:
        self.hard = {"answer 3"}
        self.seen: list[str] = []

    def grade(self, tasks: list[Task]) -> list[Grade]:
        self.seen += [task.answer for task in tasks]
        return [Grade(error="prose") if task.answer in self.hard else Grade({"semantic": 0.5}) for task in tasks]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    judge = Judge()
    monkeypatch.setattr(workers.graders, "open_grader", lambda *_: judge)
    grade_in_this_process(monkeypatch)
    return judge


def test_failed_grades_are_asked_for_again_until_they_succeed(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [{"id": f"q{n}", "text": f"What is {n}?", "answers": ["x"]} for n in range(COUNT)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    settings = config.load_config(
        {
            "workspace": str(tmp_path / "workspace"), "queries.path": str(tmp_path / "queries.jsonl"),
            "encoder.model": "hashing-64", "evaluate.arms": ["base"], "evaluate.metrics": ["semantic"],
        }
    )  # fmt: skip
    url = publish_answers(settings.workspace, "base", [answer_row(f"q{n}", f"answer {n}") for n in range(COUNT)])
    monkeypatch.setattr(evaluate, "_answered", lambda *_: {"base": url})
    monkeypatch.setattr(evaluate.staged_queries, "require_same", lambda *_: None)
    read = artifacts.read_manifest
    fingerprint = staged_queries.fingerprint(settings)
    monkeypatch.setattr(
        evaluate.runs, "read_manifest", lambda run: {**read(run), "input": {"fingerprint": fingerprint}}
    )

    first = evaluate.evaluate(settings)
    assert first.metrics["base"]["semantic"]["n"] == COUNT - 1
    judge.seen.clear()
    assert evaluate.evaluate(settings).path == first.path, "the same grade failed again, so nothing is new"
    assert judge.seen == ["answer 3"]
    with pytest.raises(GradingError, match="1 of 20 grades of semantic failed"):
        evaluate.evaluate(settings.with_values({"evaluate.max_failed_grades": 0.04}))
    judge.hard.clear()
    whole = evaluate.evaluate(settings)
    assert whole.path != first.path
    assert whole.metrics["base"]["semantic"]["n"] == COUNT
    judge.seen.clear()
    assert evaluate.evaluate(settings).path == whole.path
    assert judge.seen == []
